"""Accuracy by method with every client, and what each client gains."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedl2p.report.drawing import (
    BLUE,
    GREY,
    INK,
    LINE,
    MAX_MARKS,
    ORANGE,
    POOL_COLOURS,
    SMALL,
    Drawing,
    Mark,
    jitter,
    legend,
    new_panel,
    say_empty,
)
from fedl2p.report.gains import Gain, accuracies, summarize
from fedl2p.report.table import cells, method_label, pool_names


def accuracy_bars(results: Mapping[str, Any]) -> Drawing:
    """Each method's accuracy on each pool: mean, SD over clients, the number beside it, and a dot for each client.

    Args:
        results: as in `results.json`; what was not measured has no bar.
    """
    pools = pool_names(results)
    measured = {
        name: {pool: cell for pool, cell in row.items() if math.isfinite(cell.accuracy)}
        for name, row in cells(results).items()
    }
    methods = [name for name, row in measured.items() if row]
    figure, axes = new_panel(1.1 + 0.21 * len(methods) * max(len(pools), 1))
    drawing = Drawing("accuracy", "Accuracy after personalization", "", "Nothing measured.", figure)
    if not methods:
        say_empty(axes)
        return drawing
    height = 0.84 / len(pools)
    clients = {pool: [accuracies(results, name, pool) for name in methods] for pool in pools}
    dots = sum(len(own) for found in clients.values() for own in found) <= MAX_MARKS
    for index, pool in enumerate(pools):
        colour = POOL_COLOURS[index % len(POOL_COLOURS)]
        drawn = [(place, measured[name]) for place, name in enumerate(methods) if pool in measured[name]]
        # A method's bars lie around its label, also where it has fewer than others.
        places = [place + (list(row).index(pool) - (len(row) - 1) / 2) * height for place, row in drawn]
        bars = [row[pool] for _, row in drawn]
        means = [100 * cell.accuracy for cell in bars]
        spreads = [100 * cell.sd if math.isfinite(cell.sd) else 0.0 for cell in bars]
        axes.barh(places, means, 0.9 * height, color=colour, alpha=0.35, linewidth=0, label=f"{pool} clients")
        axes.errorbar(means, places, xerr=spreads, fmt="|", color=INK, markersize=8, elinewidth=1, capsize=2, zorder=4)
        for at, mean, cell in zip(places, means, bars, strict=True):
            weight = "bold" if cell.best else "normal"
            axes.text(103, at, f"{mean:.1f}", va="center", size=SMALL, weight=weight, color=INK)
        for at, (place, _) in zip(places, drawn, strict=True):
            own = clients[pool][place] if dots else {}
            marks = [Mark(name, f"{method_label(results, methods[place])} {100 * v:.1f} %") for name, v in own.items()]
            offsets = at + jitter(len(own), 0.7 * height)
            drawing.scatter(axes, [100 * v for v in own.values()], list(offsets), marks, colour=colour, size=4)
    axes.set_yticks(range(len(methods)), [_short(method_label(results, name)) for name in methods])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("Accuracy on test data (%)")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    legend(axes, ncols=3)
    drawing.caption = (
        "Bar and number: mean over clients; line: one SD over clients either way; "
        + ("dots: the clients; " if dots else "")
        + "bold: the best of its pool."
    )
    drawing.alt = "Accuracy in %, mean ± SD over clients. " + "; ".join(
        f"{method_label(results, name)}: " + ", ".join(f"{pool} {cell.text}" for pool, cell in measured[name].items())
        for name in methods
    )
    return drawing


def gain_figure(pool: str, gains: Sequence[Gain], results: Mapping[str, Any]) -> Drawing:
    """Every client's gain over its best baseline, from the largest loss to the largest gain.

    Args:
        pool: whose clients.
        gains: of `client_gains`, at least one.
        results: as in `results.json`, for the methods' names.
    """
    figure, axes = new_panel(2.6)
    summary = summarize(gains)
    points = np.array([gain.points for gain in gains])
    places = np.arange(1, len(points) + 1)
    for colour, chosen in ((BLUE, points > 0), (ORANGE, points < 0), (GREY, points == 0)):
        axes.vlines(places[chosen], 0, points[chosen], color=colour, alpha=0.5, linewidth=min(4, 250 / len(points)))
    drawing = Drawing(f"gain-{pool}", f"Gain of each {pool} client over its best baseline", "", "", figure)
    if len(gains) <= MAX_MARKS:
        for colour, sign in ((BLUE, 1), (ORANGE, -1), (GREY, 0)):
            own = [i for i, value in enumerate(points) if np.sign(value) == sign]
            marks = [Mark(gains[i].client, _gain_text(gains[i], results)) for i in own]
            drawing.scatter(axes, [places[i] for i in own], [points[i] for i in own], marks, colour=colour, size=14)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axhline(summary.mean, color=INK, linewidth=1, linestyle="--", label=f"mean {summary.mean:+.1f}")
    axes.set_xlabel(f"{len(points)} clients, by gain")
    axes.set_ylabel("Points of accuracy")
    axes.set_xticks([])
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    legend(axes)
    drawing.caption = (
        f"FedL2P minus the best of the baselines, which is chosen for each client on its test data: the hardest "
        f"comparison there is. Better for {summary.better}, equal for {summary.equal}, worse for {summary.worse}."
    )
    low, high = gains[0], gains[-1]
    drawing.alt = (
        f"{pool} clients: mean gain {summary.mean:+.1f} points over {summary.count} clients; better for "
        f"{summary.better}, equal for {summary.equal}, worse for {summary.worse}; from {low.points:+.1f} "
        f"({low.client}) to {high.points:+.1f} ({high.client})."
    )
    return drawing


def _gain_text(gain: Gain, results: Mapping[str, Any]) -> str:
    own, other = 100 * gain.accuracy, 100 * gain.baseline_accuracy
    label = method_label(results, gain.baseline)
    return f"{gain.points:+.1f} points: FedL2P {own:.1f} %, {label} {other:.1f} %"


def _short(label: str, most: int = 24) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"
