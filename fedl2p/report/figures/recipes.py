"""How beta and eta are spread over clients, layer by layer (the paper's Figures 2 and 4)."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from fedl2p.report.drawing import (
    GREY,
    INK,
    LINE,
    MAX_MARKS,
    POOL_COLOURS,
    SMALL,
    Drawing,
    Mark,
    jitter,
    legend,
    new_panel,
    say_empty,
)
from fedl2p.report.recipes import Kind, LayerSpread, layer_spreads, model_sparsity

MANY_DECADES = 100.0
LONGEST_NAME = 24
MAX_IN_WORDS = 12  # layers whose numbers an alternative text carries; the table beside it has all
TITLES = {
    "beta": "β: how far each batch-norm layer trusts the client",
    "eta": "η: the learning rate of each parameter tensor",
}


def hyperparameter_boxes(
    rows: Iterable[Mapping[str, Any]],
    kind: Kind,
    *,
    group: str = "",
    limits: tuple[float, float] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Drawing:
    """How beta or eta differ over the clients: for each layer, first layer on top, a box a pool.

    A box holds the middle half of the clients, its line is the median, the whiskers go on to 1.5 box lengths, and the
    dots are the clients: all of them, or those beyond the whiskers where they are very many.

    Args:
        rows: of `hyperparameter_rows`; values that are not finite are left out.
        kind: which of the two.
        group: whose rows these are, such as a domain; empty is all clients.
        limits: of the axis of eta, so that figures can be compared; None follows the values.
        sizes: values in each tensor, for the sparsity.
    """
    rows = list(rows)
    pools = list(dict.fromkeys(str(row.get("pool", "")) for row in rows))
    by_pool = {pool: layer_spreads([row for row in rows if str(row.get("pool", "")) == pool], kind) for pool in pools}
    layers = list(dict.fromkeys(str(row["layer"]) for row in rows if row["kind"] == kind))
    layers = [layer for layer in layers if any(spread.layer == layer for own in by_pool.values() for spread in own)]
    figure, axes = new_panel(1.2 + max(0.2 * len(layers), 0.13 * len(layers) * max(len(pools), 1), 0.8))
    title = f"{TITLES[kind][0]}, {group}" if group else TITLES[kind]
    drawing = Drawing(f"{kind}-{_slug(group)}" if group else kind, title, "", "No values.", figure)
    if not layers:
        say_empty(axes)
        return drawing
    dots = sum(len(spread.values) for own in by_pool.values() for spread in own) <= MAX_MARKS
    height = 0.8 / len(pools)
    for index, (pool, spreads) in enumerate(by_pool.items()):
        offset = (index - (len(pools) - 1) / 2) * height
        places = [layers.index(spread.layer) + offset for spread in spreads]
        _boxes(drawing, axes, spreads, places, height, POOL_COLOURS[index % len(POOL_COLOURS)], pool, dots)
    axes.set_ylim(-0.6, len(layers) - 0.4)
    axes.set_yticks(range(len(layers)), [_short(layer) for layer in layers], size=SMALL)
    axes.invert_yaxis()
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    values = np.concatenate([spread.values for own in by_pool.values() for spread in own])
    value_axis(axes, kind, values, limits)
    if any(pools):
        legend(axes, ncols=3)
    drawing.caption = _caption(rows, kind, sizes, dots)
    drawing.alt = _in_words(layer_spreads(rows, kind), title, drawing.caption)
    return drawing


def _boxes(
    drawing: Drawing,
    axes: Axes,
    spreads: list[LayerSpread],
    places: list[float],
    height: float,
    colour: str,
    pool: str,
    dots: bool,
) -> None:
    """One pool's boxes as a few collections, which are ten times as fast to draw as matplotlib's boxplot.

    Without dots for all, the clients beyond the whiskers have theirs.
    """
    if not spreads:
        return
    boxes, whiskers, x, y, marks = [], [], [], [], []
    for place, spread in zip(places, spreads, strict=True):
        _, first, _, third, _ = spread.quartiles
        inside = (spread.values >= first - 1.5 * (third - first)) & (spread.values <= third + 1.5 * (third - first))
        low, high = place - 0.375 * height, place + 0.375 * height
        boxes.append([(first, low), (third, low), (third, high), (first, high)])
        whiskers.append((spread.values[inside].min(), first, third, spread.values[inside].max()))
        chosen = np.flatnonzero(np.ones_like(inside) if dots else ~inside)
        x += spread.values[chosen].tolist()
        y += (place + jitter(len(chosen), 0.6 * height)).tolist()
        marks += [Mark(spread.clients[i], f"{spread.layer} {spread.values[i]:.4g}") for i in chosen]
    label = f"{pool} clients" if pool else None
    axes.add_collection(PolyCollection(boxes, facecolor=colour, edgecolor=colour, alpha=0.35, label=label))
    ends = np.array(whiskers)
    for left, right in ((0, 1), (2, 3)):
        axes.hlines(places, ends[:, left], ends[:, right], color=colour, linewidth=1)
    medians = [spread.quartiles[2] for spread in spreads]
    reach = 0.375 * height
    axes.vlines(medians, np.array(places) - reach, np.array(places) + reach, color=INK, linewidth=1.5, zorder=2.5)
    drawing.scatter(axes, x, y, marks, colour=colour, size=3)


def value_axis(axes: Axes, kind: Kind, values: np.ndarray[Any, Any], limits: tuple[float, float] | None = None) -> None:
    """Limits and scale of the axis of values: 0 to 1 for beta; for eta logarithmic where rates differ very much."""
    if kind == "beta":
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("β (0: pretrained statistics, 1: the client's own)")
        return
    axes.set_xlabel("η (step size; 0: the tensor stays as it was)")
    axes.axvline(0, color=GREY, linewidth=0.8)
    if limits is not None:
        axes.set_xlim(*limits)
    sizes = np.abs(values[values != 0])
    if sizes.size and sizes.max() > MANY_DECADES * np.quantile(sizes, 0.25):
        # Rates of very different size and either sign: logarithmic, with a linear piece around 0.
        axes.set_xscale("symlog", linthresh=10.0 ** math.floor(math.log10(np.quantile(sizes, 0.25))))


def _caption(rows: list[Mapping[str, Any]], kind: Kind, sizes: Mapping[str, int] | None, dots: bool) -> str:
    count = len({row["client"] for row in rows if "client" in row})
    dotted = "the clients" if dots else "clients far from the others"
    parts = [f"{count} client{'' if count == 1 else 's'}; box: the middle half; line: the median; dots: {dotted}."]
    if kind == "eta":
        parts.append(f"Sparsity of the model: {model_sparsity(rows, sizes):.2f}.")
    return " ".join(parts)


def _in_words(spreads: list[LayerSpread], title: str, caption: str) -> str:
    """Median and range of each layer; of the first and last ones where there are many."""
    half = MAX_IN_WORDS // 2
    chosen = spreads if len(spreads) <= MAX_IN_WORDS else [*spreads[:half], *spreads[-half:]]
    said = []
    for spread in chosen:
        low, _, middle, _, high = spread.quartiles
        said.append(f"{spread.layer} median {middle:.3g} ({low:.3g} to {high:.3g})")
    left = f"; {len(spreads) - len(chosen)} layers between are in the table" if len(spreads) > len(chosen) else ""
    return f"{title}. {caption} {'; '.join(said)}{left}."


def _short(name: str) -> str:
    """A layer's name for an axis: of a long one its begin and its end."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _slug(name: str) -> str:
    """A part of a file's name; names that differ in other signs only are told apart by a number."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    return plain if plain == name else f"{plain or 'group'}-{sum(name.encode()) % 997}"
