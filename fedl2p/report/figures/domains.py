"""Cluster distance maps (the paper's Figures 3 and 5)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from fedl2p.report.domains import Feature, mean_off_diagonal
from fedl2p.report.drawing import PAPER, SMALL, Drawing, new_panel

MAX_NUMBERS = 10  # domains whose cells have room for a number
FILES = {"ξ": "xi", "β": "beta", "x": "x", "η": "eta"}


def distance_map(feature: Feature, names: Sequence[str], values: NDArray[Any]) -> Drawing:
    """How far domains are from each other, measured by how far their own clients are apart.

    Args:
        feature: what was compared.
        names: of the D domains.
        values: of `cluster_distance_map`, shape (D, D); cells that are not finite stay empty.
    """
    figure, axes = new_panel(min(2.0 + 0.33 * len(names), 6.0))
    finite = values[np.isfinite(values)]
    bound = max(float(np.abs(finite).max()) if finite.size else 0.0, 0.1)
    norm, colours = Normalize(-bound, bound), colormaps["RdBu"]
    for row in range(len(names)):
        for column in range(len(names)):
            value = float(values[row, column])
            if not math.isfinite(value):
                continue
            colour = colours(norm(value))
            axes.add_patch(_cell(column, row, colour))
            if len(names) <= MAX_NUMBERS:
                dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.55
                ink = "#ffffff" if dark else "#000000"
                axes.text(
                    column, row, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", size=SMALL - 1, color=ink
                )
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
    axes.set_xticks(range(len(names)), short, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), short)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    pairs = [(i, j) for i in range(len(names)) for j in range(i) if math.isfinite(values[i, j])]
    ordered = sorted(pairs, key=lambda pair: values[pair])
    said = [f"{names[j]} and {names[i]} {values[i, j]:+.2f}" for i, j in ordered]
    ends = said if len(said) <= 10 else [*said[:5], "...", *said[-5:]]
    return Drawing(
        f"distance-{FILES[feature.symbol]}",
        f"{feature.symbol}, the {feature.side} of {feature.net}",
        f"Mean off the diagonal {mean_off_diagonal(values):+.2f}.",
        f"Log of relative distances between domains in {feature.symbol}, from the nearest pair to the farthest: "
        f"{'; '.join(ends)}.",
        figure,
    )


def _cell(column: int, row: int, colour: Any) -> Rectangle:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor=PAPER, linewidth=1)
