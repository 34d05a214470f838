"""The figures of a run, drawn with matplotlib's objects: no window, no global state, safe in threads."""

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from fedl2p.federation.state import RoundRecord
from fedl2p.io import write_atomically
from fedl2p.report.table import cells, method_label, number, pool_names

# Okabe and Ito's colours, which people with colour blindness can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#767676"
POOL_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9")
WIDTH = 8.0  # inches
DPI = 150
MANY_DECADES = 100.0

History = Sequence[RoundRecord | Mapping[str, Any]]
Kind = Literal["beta", "eta"]


def learning_curve(history: History) -> Figure:
    """The validation loss by round, with the best round marked, and the loss while training.

    Args:
        history: the records, or their dictionaries from `metrics.jsonl`; losses may be None or NaN and leave a gap.
    """
    figure, axes = _figure(4.0, title="Validation loss on seen clients")
    records = [record.as_dict() if isinstance(record, RoundRecord) else record for record in history]
    rounds = np.array([number(record.get("round")) for record in records])
    val_loss = np.array([number(record.get("val_loss")) for record in records])
    meta_loss = np.array([number(record.get("meta_loss")) for record in records])
    if not np.isfinite(val_loss).any():
        return _empty(figure, axes)
    if np.isfinite(meta_loss).any():
        axes.plot(rounds, meta_loss, color=GREY, linewidth=1, label="sampled clients, while training")
    marker = "o" if len(records) <= 30 else ""
    axes.plot(rounds, val_loss, color=BLUE, linewidth=2, marker=marker, markersize=4, label="fixed cohort, validation")
    best = int(np.nanargmin(np.where(np.isfinite(val_loss), val_loss, np.nan)))
    label = f"best: {val_loss[best]:.3f} in round {rounds[best]:.0f}"
    axes.plot(rounds[best], val_loss[best], "D", color=ORANGE, markeredgecolor="black", markersize=8, label=label)
    axes.set_xlabel("Round")
    axes.set_ylabel("Loss after fine-tuning\n(mean over samples)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.legend(frameon=False)
    return figure


def accuracy_bars(results: Mapping[str, Any]) -> Figure:
    """Each method's accuracy on each pool: mean, SD over clients, and the number beside it.

    Args:
        results: as in `results.json`; what was not measured has no bar.
    """
    pools = pool_names(results)
    measured = {
        name: {pool: cell for pool, cell in row.items() if math.isfinite(cell.accuracy)}
        for name, row in cells(results).items()
    }
    methods = [name for name, row in measured.items() if row]
    figure, axes = _figure(1.5 + 0.32 * len(methods) * max(len(pools), 1), title="Accuracy after personalization")
    if not methods:
        return _empty(figure, axes)
    height = 0.8 / len(pools)
    for index, pool in enumerate(pools):
        drawn = [(place, measured[name]) for place, name in enumerate(methods) if pool in measured[name]]
        # A method's bars lie around its label, also where it has fewer than others.
        places = [place + (list(row).index(pool) - (len(row) - 1) / 2) * height for place, row in drawn]
        bars = [row[pool] for _, row in drawn]
        means = [100 * cell.accuracy for cell in bars]
        spreads = [100 * cell.sd if math.isfinite(cell.sd) else 0.0 for cell in bars]
        colour = POOL_COLOURS[index % len(POOL_COLOURS)]
        axes.barh(places, means, 0.92 * height, color=colour, label=f"{pool} clients")
        axes.errorbar(means, places, xerr=spreads, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        for place, mean, cell in zip(places, means, bars, strict=True):
            weight = "bold" if cell.best else "normal"
            # In the bar's foot, where neither the whisker nor another bar can cover it.
            axes.text(1, place, f"{mean:.1f}", va="center", size=8, weight=weight, color=_ink(colour))
    axes.set_yticks(range(len(methods)), [method_label(results, name) for name in methods])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("Accuracy on test data (%), mean ± SD over clients")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(pools), frameon=False)
    return figure


def hyperparameter_boxes(rows: Iterable[Mapping[str, Any]], kind: Kind) -> Figure:
    """How beta or eta differ over the clients, a box a layer, first layer on top.

    A box holds the middle half of the clients, its line is the median, the whiskers go on to 1.5 box lengths, and
    points are clients beyond.

    Args:
        rows: of `hyperparameter_rows`; values that are not finite are left out.
        kind: which of the two.
    """
    layers: dict[str, list[float]] = {}
    for row in rows:
        value = number(row["value"])
        if row["kind"] == kind and math.isfinite(value):
            layers.setdefault(str(row["layer"]), []).append(value)
    title = {
        "beta": "How far each batch-norm layer trusts the client",
        "eta": "The learning rate of each parameter tensor",
    }[kind]
    figure, axes = _figure(1.4 + 0.24 * max(len(layers), 4), title=title)
    if not layers:
        return _empty(figure, axes)
    colour = BLUE if kind == "beta" else GREEN
    axes.boxplot(
        list(layers.values()),
        orientation="horizontal",
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": colour, "edgecolor": colour, "alpha": 0.55},
        medianprops={"color": "black", "linewidth": 1.5},
        whiskerprops={"color": colour},
        capprops={"color": colour},
        flierprops={"marker": ".", "markersize": 4, "markerfacecolor": colour, "markeredgecolor": "none"},
    )
    axes.set_yticks(range(1, len(layers) + 1), list(layers), size=8 if len(layers) > 15 else 9)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    _value_axis(axes, kind, np.concatenate([np.asarray(values) for values in layers.values()]))
    return figure


def save_figures(
    folder: str | os.PathLike[str],
    *,
    results: Mapping[str, Any],
    history: History = (),
    rows: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Path]:
    """Draws what there is and writes PNG files, each whole or not at all.

    Args:
        folder: usually `<run>/figures`; made if missing.
        results: for `accuracy.png`, where there are methods.
        history: for `learning_curve.png`, where there are rounds.
        rows: for `beta.png` and `eta.png`, where there are rows of that kind.

    Returns:
        The files by name (`learning_curve`, `accuracy`, `beta`, `eta`), for `write_page`.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    figures: dict[str, Figure] = {}
    if results.get("methods"):
        figures["accuracy"] = accuracy_bars(results)
    if history:
        figures["learning_curve"] = learning_curve(history)
    kinds: tuple[Kind, ...] = ("beta", "eta")
    for kind in kinds:
        if any(row["kind"] == kind for row in rows):
            figures[kind] = hyperparameter_boxes(rows, kind)
    return {name: write_atomically(Path(folder) / f"{name}.png", png(figure)) for name, figure in figures.items()}


def new_canvas(height: float) -> Figure:
    """An empty figure of the project's width, `height` inches high, that belongs to no window."""
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def _figure(height: float, *, title: str) -> tuple[Figure, Axes]:
    figure = new_canvas(height)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", weight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _empty(figure: Figure, axes: Axes) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "Nothing to draw: no finite values.", ha="center", va="center", color=GREY)
    return figure


def _value_axis(axes: Axes, kind: Kind, values: np.ndarray) -> None:
    if kind == "beta":
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("β over clients (0: pretrained statistics, 1: the client's own)")
        return
    axes.set_xlabel("η over clients (step size; 0: the tensor stays as it was)")
    axes.axvline(0, color=GREY, linewidth=0.8)
    sizes = np.abs(values[values != 0])
    if sizes.size and sizes.max() > MANY_DECADES * np.quantile(sizes, 0.25):
        # Rates of very different size and either sign: logarithmic, with a linear piece around 0.
        axes.set_xscale("symlog", linthresh=10.0 ** math.floor(math.log10(np.quantile(sizes, 0.25))))


def _ink(colour: str) -> str:
    return "white" if colour == BLUE else "black"


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    # Without matplotlib's version in it, the same run gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
