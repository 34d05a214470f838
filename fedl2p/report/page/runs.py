"""Several runs side by side: each, and mean and SD over those that differ in nothing but their seed."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from fedl2p.report.analysis import paired_bootstrap
from fedl2p.report.figures.training import learning_curves
from fedl2p.report.gains import METHOD, accuracies
from fedl2p.report.page.html import Page, fixed, gallery, heads, note, plain, row, table
from fedl2p.report.saved_run import SavedRun
from fedl2p.report.table import NOTHING, cells, method_label, number, pool_names

# What may differ between runs of one group: the seed, and what does not touch a result.
_APART = ("seed", "output_dir", "threads", "wandb")


def side_by_side(page: Page, runs: Sequence[SavedRun]) -> str:
    """Sections that compare the runs; nothing for a single one."""
    if len(runs) < 2:
        return ""
    names, groups = unique_names(runs), group_runs(runs)
    curves = learning_curves({name: run.history for name, run in zip(names, runs, strict=True)})
    return (
        page.section("Runs", _overview(runs, names, groups))
        + page.section("Accuracy over runs", _methods(runs, names, groups))
        + page.section("Differences over runs", _differences(runs, groups))
        + page.section("Validation loss over runs", gallery([page.figure(curves)]))
    )


def unique_names(runs: Sequence[SavedRun]) -> list[str]:
    """The runs' names, with a number behind those that come twice."""
    names: list[str] = []
    for run in runs:
        name, count = run.name, 1
        while name in names:
            count += 1
            name = f"{run.name} ({count})"
        names.append(name)
    return names


def group_runs(runs: Sequence[SavedRun]) -> list[list[int]]:
    """Places of the runs by configuration, where seeds and folders do not count."""
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        config = run.results.get("config")
        kept = {key: value for key, value in config.items() if key not in _APART} if isinstance(config, Mapping) else {}
        groups.setdefault(json.dumps(_without_seed(kept), sort_keys=True, default=str), []).append(place)
    return list(groups.values())


def _without_seed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_seed(item) for key, item in value.items() if key != "seed"}
    return value


def _overview(runs: Sequence[SavedRun], names: Sequence[str], groups: Sequence[Sequence[int]]) -> str:
    group_of = {place: letter for letter, group in zip(_letters(len(groups)), groups, strict=True) for place in group}
    body = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        config, rounds = run.results.get("config"), run.rounds
        data = (config.get("data") or {}) if isinstance(config, Mapping) else {}
        cells = [plain(run.results.get("seed")), escape(str(data.get("class_path", NOTHING)).rpartition(".")[2])]
        cells += [group_of[place], plain(rounds.get("last")), plain(rounds.get("best"))]
        cells += [fixed(number(rounds.get("best_val_loss"))), "yes" if run.finished else "no"]
        body.append(row(f'<a href="#run-{place + 1}">{escape(name)}</a>', *cells))
    caption = "Runs of one group differ in their seed alone; means are over the runs of a group."
    columns = heads("Run", "seed", "data", "group", "rounds", "best round", "best loss", "finished")
    return table(columns, body, caption, sortable=True)


def _methods(runs: Sequence[SavedRun], names: Sequence[str], groups: Sequence[Sequence[int]]) -> str:
    """Each method's mean accuracy, a table a pool: mean and SD over the runs of each group, and every run beside."""
    content = ""
    for pool in dict.fromkeys(pool for run in runs for pool in pool_names(run.results)):
        columns: list[tuple[str, dict[str, str]]] = []
        for letter, group in zip(_letters(len(groups)), groups, strict=True):
            each = [_accuracy(runs[place], pool) for place in group]
            if len(group) > 1:
                columns.append((f"{letter}, {len(group)} runs", _means(each)))
            columns += [(names[place], _means([own])) for place, own in zip(group, each, strict=True)]
        labels = {name: method_label(run.results, name) for run in runs for name in run.results.get("methods") or {}}
        body = [
            row(escape(label), *(column.get(method, NOTHING) for _, column in columns))
            for method, label in labels.items()
            if any(method in column for _, column in columns)
        ]
        caption = (
            f"{escape(pool)} clients: accuracy in %, a mean over clients; of a group of runs mean ± SD over the runs. "
            "Bold: the best of a column."
        )
        content += table(heads("Method", *(title for title, _ in columns)), body, caption, sortable=True)
    return content


def _accuracy(run: SavedRun, pool: str) -> dict[str, float]:
    """The mean accuracy of each method on a pool, where it is finite."""
    found = {name: row[pool].accuracy for name, row in cells(run.results).items() if pool in row}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _means(runs: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """A cell a method: mean and SD over the runs that have it, the best in bold."""
    values = {
        name: [run[name] for run in runs if name in run] for name in dict.fromkeys(n for run in runs for n in run)
    }
    top = max((np.mean(own) for own in values.values()), default=math.nan)
    shown = {}
    for name, own in values.items():
        sd = f" ± {100 * np.std(own, ddof=1):.1f}" if len(own) > 1 else ""
        best = ' class="best"' if np.mean(own) == top else ""
        shown[name] = f"<td{best}>{100 * np.mean(own):.1f}{sd}</td>"
    return shown


def _differences(runs: Sequence[SavedRun], groups: Sequence[Sequence[int]]) -> str:
    """FedL2P minus each other method over the clients of all runs of a group."""
    body = []
    for letter, group in zip(_letters(len(groups)), groups, strict=True):
        own = [runs[place] for place in group]
        for method in dict.fromkeys(name for run in own for name in run.results.get("methods") or {}):
            for pool in dict.fromkeys(pool for run in own for pool in pool_names(run.results)):
                values, used = _client_differences(own, method, pool)
                if method == METHOD or not values:
                    continue
                mean, low, high = (100 * value for value in paired_bootstrap(values, seed=0))
                label = next(method_label(run.results, method) for run in own if method in run.results["methods"])
                interval = f"{low:+.1f} to {high:+.1f}" if math.isfinite(low) else NOTHING
                counts = (f"{len(values)}", f"{used}")
                body.append(
                    row(f"FedL2P minus {escape(label)}", escape(pool), letter, f"{mean:+.2f}", interval, *counts)
                )
    caption = (
        "Points of accuracy, client by client, over the clients of all runs of a group; 95 % bootstrap interval over "
        "these clients. Clients of runs that share data are not independent, so it is somewhat too narrow."
    )
    columns = heads("Methods", "pool", "group", "difference", "interval", "clients", "runs")
    return table(columns, body, caption, sortable=True) or note("No run has results yet.")


def _client_differences(runs: Sequence[SavedRun], method: str, pool: str) -> tuple[list[float], int]:
    values: list[float] = []
    used = 0
    for run in runs:
        own, other = accuracies(run.results, METHOD, pool), accuracies(run.results, method, pool)
        both = [own[client] - other[client] for client in own if client in other]
        values += both
        used += bool(both)
    return values, used


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(count)]
