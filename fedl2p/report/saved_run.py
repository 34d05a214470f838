"""A run's folder, read for a report: whole, or as far as an interrupted run came."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]  # OmegaConf's own parser

from fedl2p.errors import RunFolderError
from fedl2p.pools import ROLES
from fedl2p.report.hyperparameters import read_hyperparameters
from fedl2p.report.split import ClientSplit
from fedl2p.report.table import number

Row = Mapping[str, Any]


@dataclass
class SavedRun:
    """What a report knows about a run; every part but the name may be empty.

    Attributes:
        name: of its folder.
        results: as in `results.json`.
        history: the round records, as in `metrics.jsonl`.
        recipes: the rows of `hyperparameters.csv`.
        net_inputs: those of `net_inputs.csv`.
        clients: who has what, as in `clients.json`.
        classes: the names of the labels.
        finished: whether the run came to its end.
    """

    name: str = "run"
    results: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    recipes: Sequence[Row] = ()
    net_inputs: Sequence[Row] = ()
    clients: list[ClientSplit] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    finished: bool = True

    @property
    def rounds(self) -> dict[str, Any]:
        """Best and last round and their losses, from the results or, before there are any, from the history."""
        if self.results.get("rounds"):
            return dict(self.results["rounds"])
        losses = {record.get("round"): number(record.get("val_loss")) for record in self.history}
        finite = {key: loss for key, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            return {}
        best = min(finite, key=lambda key: finite[key])
        return {
            "best": best,
            "last": list(losses)[-1],
            "best_val_loss": finite[best],
            "first_val_loss": next(iter(losses.values())),
            "failures": sum(len(record.get("failures") or {}) for record in self.history),
        }

    @property
    def who(self) -> dict[str, tuple[str, str]]:
        """Pool and domain of every client that any part names, by name."""
        found = {client.name: (client.pool, client.domain) for client in self.clients}
        for row in self.recipes:
            found.setdefault(str(row["client"]), (str(row["pool"]), str(row["domain"])))
        for method in (self.results.get("methods") or {}).values():
            for pool, measured in (method or {}).items():
                if isinstance(measured, Mapping):
                    for name in measured.get("clients") or {}:
                        found.setdefault(name, (pool, "all"))
        return found


def plain_records(history: Iterable[Any]) -> list[dict[str, Any]]:
    """Round records as dictionaries, whether they are so already or have an `as_dict`."""
    return [dict(record) if isinstance(record, Mapping) else record.as_dict() for record in history]


def read_run(folder: str | os.PathLike[str]) -> SavedRun:
    """Reads a run's folder; what an interrupted run has not written yet is empty.

    Raises:
        RunFolderError: it is no run's folder, or one of its files is damaged.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file() and not (path / "results.json").is_file():
        raise RunFolderError(f"'{path}' holds no run; needed is a folder that `fedl2p run` has made.")
    results = _json(path / "results.json")
    if results is not None and not isinstance(results, dict):
        raise RunFolderError(f"The file {path / 'results.json'} holds no results.")
    clients, classes = _clients(path / "clients.json")
    return SavedRun(
        name=path.resolve().name,
        results=results or _unfinished(path),
        history=_history(path / "metrics.jsonl"),
        recipes=_rows(path / "hyperparameters.csv"),
        net_inputs=_rows(path / "net_inputs.csv"),
        clients=clients,
        classes=classes,
        finished=results is not None,
    )


def _unfinished(path: Path) -> dict[str, Any]:
    """What is known before there are results: the configuration, and the rates that were tuned."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    except (OSError, ValueError, OmegaConfBaseException, YAMLError) as error:
        raise RunFolderError(f"The file {path / 'config.yaml'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"The file {path / 'config.yaml'} holds no configuration.")
    tuned = _json(path / "checkpoints" / "tuning.json") or {}
    methods = {name: {"settings": settings} for name, settings in tuned.items()}
    return {"config": config, "methods": methods} | ({"seed": config["seed"]} if "seed" in config else {})


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"The file {path} is damaged ({error}).") from error


def _history(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for place, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if place < len(lines) - 1:  # the last line of a run that was killed may be a part of one
                raise RunFolderError(f"Line {place + 1} of {path} is damaged ({error}).") from error
    return records


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_hyperparameters(path) if path.is_file() else []


def _clients(path: Path) -> tuple[list[ClientSplit], list[str]]:
    stored = _json(path)
    if stored is None:
        return [], []
    try:
        classes = [str(name) for name in stored["classes"]]
        return [_client(entry, len(classes)) for entry in stored["clients"]], classes
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"The file {path} does not describe clients ({error!r}).") from error


def _client(entry: Mapping[str, Any], num_classes: int) -> ClientSplit:
    """Where labels could not be counted, all samples of a role stand in a single column."""
    if "labels" in entry:
        counts = np.array([entry["labels"][role] for role in ROLES], dtype=np.int64).reshape(len(ROLES), num_classes)
    else:
        counts = np.array([[entry["sizes"][role]] for role in ROLES], dtype=np.int64)
    return ClientSplit(
        name=str(entry["name"]),
        pool=str(entry["pool"]),
        domain=str(entry["domain"]),
        counts=counts,
        details={str(key): float(value) for key, value in (entry.get("details") or {}).items()},
    )
