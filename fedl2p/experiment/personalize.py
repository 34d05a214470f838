"""`fedl2p personalize`: a run's model made a new client's own, from data of a configuration or a folder of images."""

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy

from fedl2p.core.functional import LossFunction, expected_error
from fedl2p.core.refinement import RefinementSettings
from fedl2p.datamodules.base.client import ClientData, ClientDataModule, num_samples
from fedl2p.datamodules.base.federated import FederatedDataModule
from fedl2p.errors import ConfigError, RunFolderError
from fedl2p.experiment.build import GLOBAL_MODEL, build_data, build_fabric, build_model
from fedl2p.experiment.config import from_yaml, load_config
from fedl2p.experiment.context import with_weights
from fedl2p.experiment.folder import CONFIG
from fedl2p.experiment.image_client import image_client
from fedl2p.experiment.schema import Config, ValidationLoss
from fedl2p.io import TEMPORARY, write_json, write_tensors
from fedl2p.policy import NamedHyperparameters, Personalization, Policy
from fedl2p.policy.hyperparameters import UnusualClientWarning
from fedl2p.report.hyperparameters import write_hyperparameters

PERSONALIZED = "personalized.safetensors"
HYPERPARAMETERS = "hyperparameters.csv"
REPORT = "report.json"


@dataclass(frozen=True)
class NewClient:
    """What the command is asked.

    Attributes:
        run: the folder of a run.
        data: a configuration, as `fedl2p run` takes it, or a folder of images by class.
        client: name or index of a client of a configuration; None for a folder.
        out: the folder that is written.
        refine: whether the learning rates are refined on validation data.
        mean_recipe: whether the seen clients' mean recipe is taken in the place of the nets' answer.
    """

    run: Path
    data: str
    client: str | None
    out: Path
    refine: bool = False
    mean_recipe: bool = False


def personalize(asked: NewClient) -> dict[str, Any]:
    """Personalizes, and writes `personalized.safetensors`, `hyperparameters.csv` and `report.json`.

    Args:
        asked: see `NewClient`.

    Returns:
        What `report.json` holds.

    Raises:
        ConfigError: the configuration or the client is wrong.
        DataError: the data are of no use.
        ModelError: the run's files are damaged, or its nets do not fit.
        RunFolderError: there is no run, or the folder to write to is in use.
    """
    _require_free(asked.out)
    config = _run_config(asked.run)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    client = _client_data(asked, config)
    device = build_fabric(config).device
    model = with_weights(build_model(config), asked.run / GLOBAL_MODEL, "The global model of the run").eval().to(device)
    policy = Policy.load(asked.run, settings=config.client, val_loss_fn=_val_loss(config))
    recipe = _mean_recipe(policy, asked.run) if asked.mean_recipe else None
    has_val = num_samples(client.client.val) > 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnusualClientWarning)
        done = policy.adapt(
            model,
            client.train_dataloader(),
            hyperparameters=recipe,
            refine=RefinementSettings() if asked.refine else None,
            val_loader=client.val_dataloader() if has_val else None,
            statistics_loader=client.statistics_dataloader(),
        )
    notices = [str(notice.message) for notice in caught if issubclass(notice.category, UnusualClientWarning)]
    for text in notices:
        Console(stderr=True).print(f"Warning: {text}", markup=False, highlight=False, soft_wrap=True)
    report = _report(asked, client, model, done, notices)
    _write(asked.out, client, done, report)
    return report


def summary(report: dict[str, Any]) -> str:
    """Lines for a person: what the client has, and what was gained."""
    sizes = ", ".join(f"{count} {part}" for part, count in report["samples"].items() if count)
    lines = [f"{report['client']}: {sizes} samples; recipe: {report['recipe']}"]
    for part, own in report["measured"].items():
        accuracy = {name: f"{100 * measured['accuracy']:.1f} %" for name, measured in own.items()}
        lines.append(f"{part} accuracy: {accuracy['personalized']} (global model {accuracy['global']})")
    return "\n".join(lines)


def _require_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"--out '{out}' is a file; choose a folder.")
    if out.is_dir() and any(out.iterdir()):
        raise RunFolderError(f"--out '{out}' holds files already; choose another folder.")


def _run_config(run: Path) -> Config:
    path = run / CONFIG
    if not path.is_file():
        raise RunFolderError(f"'{run}' is not the folder of a run: it has no {CONFIG}.")
    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise RunFolderError(f"The file {path} is damaged: {error}") from error
    except Exception as error:  # YAML's errors have no common base in OmegaConf's interface
        raise RunFolderError(f"The file {path} is damaged ({' '.join(str(error).split())}).") from error


def _val_loss(config: Config) -> LossFunction | None:
    return expected_error if config.client.validation_loss is ValidationLoss.expected_error else None


def _mean_recipe(policy: Policy, run: Path) -> NamedHyperparameters:
    if policy.mean_recipe is None:
        raise RunFolderError(f"The run in '{run}' kept no mean recipe; leave --mean-recipe out.")
    return policy.mean_recipe


def _client_data(asked: NewClient, config: Config) -> ClientDataModule:
    """The new client's data, from a folder or from a configuration."""
    if Path(asked.data).is_dir():
        if asked.client is not None:
            raise ConfigError("--client is for a configuration; a folder of images is one client.")
        return image_client(Path(asked.data), config, asked.run)
    if asked.client is None:
        raise ConfigError("--client is missing; name one of the configuration's clients, or its index.")
    # Of the configuration only the data count; all else is the run's.
    rest = {"pretraining": {"weights": None, "rounds": 0}, "federation": {"client_fraction": 1.0}}
    data = build_data(load_config([asked.run / CONFIG, asked.data, rest]))
    return data.client(_client_id(data, asked.client), seed=config.seed)


def _client_id(data: FederatedDataModule, client: str) -> int:
    names = [own.name for own in data.clients]
    if client in names:
        return names.index(client)
    if client.isdecimal() and int(client) < len(names):
        return int(client)
    raise ConfigError(
        f"--client is '{client}'; allowed are 0 to {len(names) - 1} and the clients' names, as '{names[0]}' "
        "(`fedl2p data` lists them)."
    )


def _report(
    asked: NewClient, client: ClientDataModule, model: nn.Module, done: Personalization, notices: list[str]
) -> dict[str, Any]:
    """What became of the client, with the global model beside it."""
    who, loaders = client.client, {"val": client.val_dataloader, "test": client.test_dataloader}
    sizes = {role: num_samples(getattr(who, role)) for role in ("train", "val", "test")}
    return {
        "client": who.name,
        "run": str(asked.run),
        "recipe": ("mean of the seen clients" if asked.mean_recipe else "nets") + (", refined" if asked.refine else ""),
        "samples": sizes,
        "measured": {
            part: {"personalized": _measure(done.model, loader()), "global": _measure(model, loader())}
            for part, loader in loaders.items()
            if sizes[part]
        },
        "train_losses": done.train_losses,
        "refinement_losses": done.refinement_losses,
        "statistics": {
            "bn_divergence": dict(zip(done.hyperparameters.beta, done.statistics.bn_divergence.tolist(), strict=True)),
            "unusual_inputs": dict(done.hyperparameters.unusual),
        },
        "warnings": notices,
    }


@torch.no_grad()
def _measure(model: nn.Module, loader: DataLoader[Any]) -> dict[str, float]:
    """Accuracy and mean loss of a plain model in evaluation mode."""
    device = next(model.parameters()).device
    pairs = [(model(inputs.to(device).to(next(model.parameters()))), labels.to(device)) for inputs, labels in loader]
    outputs, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    accuracy = multiclass_accuracy(outputs, labels, num_classes=outputs.shape[1], average="micro")
    return {"accuracy": float(accuracy), "loss": float(nn.functional.cross_entropy(outputs, labels))}


def _rows(client: ClientData, hyperparameters: NamedHyperparameters) -> list[dict[str, Any]]:
    """As in a run's `hyperparameters.csv`."""
    who = {"client": client.name, "domain": client.domain, "pool": client.pool}
    return [
        {**who, "kind": kind, "layer": layer, "value": value}
        for kind in ("beta", "eta")
        for layer, value in getattr(hyperparameters, kind).items()
    ]


def _write(out: Path, client: ClientDataModule, done: Personalization, report: dict[str, Any]) -> None:
    """All files or none: they are written into a folder beside, which then takes the place of `out`."""
    beside = out.absolute().with_name(f".{out.name}.{uuid4().hex}{TEMPORARY}")
    try:
        write_tensors(beside / PERSONALIZED, done.model.state_dict())
        write_hyperparameters(beside / HYPERPARAMETERS, _rows(client.client, done.hyperparameters))
        write_json(beside / REPORT, report)
        os.replace(beside, out)
    except OSError as error:
        raise RunFolderError(f"Cannot write --out '{out}': {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
