"""A run's numbers: `results.json` as DESIGN.md lays it out."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from torchmetrics.functional.classification import multiclass_accuracy

from fedl2p.core.learner import Evaluation
from fedl2p.report.analysis import paired_bootstrap, spread

if TYPE_CHECKING:
    from fedl2p.datamodules.base.federated import FederatedDataModule

PACKAGES = ("fedl2p", "torch", "torchvision", "lightning", "torchmetrics", "flwr", "wandb", "omegaconf", "numpy")

ClientTable = dict[str, dict[str, float]]


@dataclass
class MethodResult:
    """One method: how tables call it, what it was set to, and by pool and client name accuracy, loss and count."""

    label: str
    settings: dict[str, Any]
    pools: dict[str, ClientTable]

    def as_dict(self) -> dict[str, Any]:
        """As in `results.json`: mean and spread over clients, beside every client."""
        result: dict[str, Any] = {"label": self.label, "settings": self.settings}
        for pool, clients in self.pools.items():
            result[pool] = {
                "accuracy": spread([row["accuracy"] for row in clients.values()]),
                "loss": spread([row["loss"] for row in clients.values()]),
                "clients": clients,
            }
        return result


def client_table(
    data: "FederatedDataModule", client_ids: Sequence[int], measured: Sequence[dict[str, Evaluation]]
) -> ClientTable:
    """Accuracy (by torchmetrics), loss and number of test samples of each client."""
    table: ClientTable = {}
    for client_id, parts in zip(client_ids, measured, strict=True):
        test = parts["test"]
        accuracy = multiclass_accuracy(test.outputs, test.targets, num_classes=data.num_classes, average="micro")
        table[data.clients[client_id].name] = {
            "accuracy": float(accuracy),
            "loss": test.loss,
            "count": len(test.targets),
        }
    return table


def mean_of(results: Sequence[MethodResult], settings: dict[str, Any]) -> MethodResult:
    """One result of several of the same clients: each client's accuracy and loss are the means."""
    pools = {
        pool: {
            name: {key: sum(r.pools[pool][name][key] for r in results) / len(results) for key in ("accuracy", "loss")}
            | {"count": row["count"]}
            for name, row in clients.items()
        }
        for pool, clients in results[0].pools.items()
    }
    return MethodResult(results[0].label, settings, pools)


def compare(methods: dict[str, MethodResult], *, seed: int, best: str | None = None) -> list[dict[str, Any]]:
    """FedL2P minus each other method, and the refined recipe minus what it must beat, client by client.

    Methods with the other batch-norm statistics, and the bound, are not compared.

    Args:
        methods: by key.
        seed: of the bootstrap.
        best: the fine-tuning that was best on validation data, if it is known.

    Returns:
        By pair and pool: `mean` of the differences of accuracy over clients, `low` and `high` of a 95 % bootstrap
        interval, and the same of the losses under `loss`, which is None where a loss is not finite.
    """
    others = [name for name in methods if name != "oracle" and not name.endswith(("_running", "_batch"))]
    fine_tuning = [best] if best else [name for name in others if name.startswith("ft_")]
    pairs = [("fedl2p", other) for other in others if other != "fedl2p"]
    pairs += [("fedl2p_refined", other) for other in ("mean_recipe", "fedl2p", "ft_refined", *fine_tuning)]
    rows = []
    for a, b in dict.fromkeys(pair for pair in pairs if set(pair) <= set(methods)):
        for pool in methods[a].pools:
            if pool in methods[b].pools:
                accuracy = _interval(methods, a, b, pool, "accuracy", seed)
                assert accuracy is not None  # an accuracy is always finite
                loss = _interval(methods, a, b, pool, "loss", seed)
                rows.append({"a": a, "b": b, "pool": pool, **accuracy, "loss": loss})
    return rows


def _interval(
    methods: dict[str, MethodResult], a: str, b: str, pool: str, key: str, seed: int
) -> dict[str, float] | None:
    own, other = methods[a].pools[pool], methods[b].pools[pool]
    differences = [own[client][key] - other[client][key] for client in own]
    if not all(map(math.isfinite, differences)):
        return None
    return dict(zip(("mean", "low", "high"), paired_bootstrap(differences, seed=seed), strict=True))


def versions() -> dict[str, str]:
    """Of Python, the machine, and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} {platform.system()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
