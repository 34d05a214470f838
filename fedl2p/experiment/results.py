"""A run's numbers: `results.json` as DESIGN.md lays it out."""

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


def compare(methods: dict[str, MethodResult], name: str = "fedl2p", *, seed: int) -> list[dict[str, Any]]:
    """FedL2P minus each other method: mean difference of accuracy over clients, with a paired bootstrap interval."""
    rows = []
    for other in methods:
        for pool in methods[name].pools if other != name else ():
            if pool in methods[other].pools:
                a, b = methods[name].pools[pool], methods[other].pools[pool]
                differences = [a[client]["accuracy"] - b[client]["accuracy"] for client in a]
                mean, low, high = paired_bootstrap(differences, seed=seed)
                rows.append({"a": name, "b": other, "pool": pool, "mean": mean, "low": low, "high": high})
    return rows


def versions() -> dict[str, str]:
    """Of Python, the machine, and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} {platform.system()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
