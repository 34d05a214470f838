"""What the page's script knows about every client, for its own part of the page."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedl2p.report.recipes import KINDS, layer_spreads
from fedl2p.report.saved_run import SavedRun
from fedl2p.report.table import method_label, number, pool_names

MAX_VALUES = 1_000_000  # of beta and eta; more would make the page too large to open


def number_clients(runs: Sequence[SavedRun]) -> dict[tuple[int, str], int]:
    """A number for each client of each run, in their order."""
    keys = [(place, name) for place, run in enumerate(runs) for name in run.who]
    return {key: number for number, key in enumerate(keys)}


def client_data(runs: Sequence[SavedRun], names: Sequence[str]) -> dict[str, Any]:
    """What the script reads: runs with their layers and classes, and clients in the order of `number_clients`.

    Args:
        runs: of the page.
        names: theirs, all different.
    """
    clients, shown = [], []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        recipes = _recipes(run)
        shown.append({"name": name, "classes": run.classes, "layers": _layers(run) if recipes else {}})
        splits = {client.name: client for client in run.clients}
        methods = _accuracies(run)
        for client, (pool, domain) in run.who.items():
            entry: dict[str, Any] = {"run": place, "name": client, "pool": pool, "domain": domain}
            if client in splits:
                split = splits[client]
                labelled = split.counts.shape[1] == len(run.classes)
                entry |= {"sizes": list(split.sizes), "details": dict(split.details)}
                entry |= {"labels": split.labels.tolist()} if labelled else {}
            entry |= recipes.get(client, {})
            entry["methods"] = methods.get(client, [])
            clients.append(entry)
    return {"runs": shown, "clients": clients}


def as_json(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside an HTML element: no sign of it ends the element or starts another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _recipes(run: SavedRun) -> dict[str, dict[str, list[float | None]]]:
    """Beta and eta by client, layers in the model's order; nothing where there are too many."""
    if len(run.recipes) > MAX_VALUES:
        return {}
    found: dict[str, dict[str, list[float | None]]] = {}
    for row in run.recipes:
        own = found.setdefault(str(row["client"]), {kind: [] for kind in KINDS})
        value = number(row["value"])
        own.setdefault(str(row["kind"]), []).append(float(f"{value:.5g}") if math.isfinite(value) else None)
    return found


def _layers(run: SavedRun) -> dict[str, list[list[Any]]]:
    """By kind: name, minimum, median and maximum of each layer over all clients."""
    found: dict[str, list[list[Any]]] = {}
    for kind in KINDS:
        names = list(dict.fromkeys(str(row["layer"]) for row in run.recipes if row["kind"] == kind))
        spreads = {spread.layer: spread.quartiles for spread in layer_spreads(run.recipes, kind)}
        nothing = (0.0, 0.0, 0.0, 0.0, 0.0)
        found[kind] = [[name, *(float(f"{spreads.get(name, nothing)[i]:.5g}") for i in (0, 2, 4))] for name in names]
    return found


def _accuracies(run: SavedRun) -> dict[str, list[list[Any]]]:
    """By client: the method's label, accuracy and loss, in the order of the methods."""
    found: dict[str, list[list[Any]]] = {}
    for method in run.results.get("methods") or {}:
        for pool in pool_names(run.results):
            measured = (run.results["methods"][method] or {}).get(pool) or {}
            for client, values in (measured.get("clients") or {}).items():
                numbers = [number((values or {}).get(key)) for key in ("accuracy", "loss")]
                kept = [value if math.isfinite(value) else None for value in numbers]
                found.setdefault(client, []).append([method_label(run.results, method), *kept])
    return found
