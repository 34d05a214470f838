"""Who has what, for the page: samples and labels of every client, as `fedl2p data` draws them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from fedl2p.pools import ROLES
from fedl2p.report.drawing import (
    DPI,
    GREY,
    INK,
    PANEL,
    POOL_COLOURS,
    SMALL,
    Drawing,
    legend,
    new_canvas,
    use_page_colours,
)
from fedl2p.report.split import ClientSplit, in_groups, label_skew, labels_known

MAX_CLASSES = 20  # that have room for a name
MAX_DOMAINS = 12  # likewise


def split_panel(clients: Sequence[ClientSplit], classes: Sequence[str]) -> Drawing:
    """Clients from left to right, by pool, domain and size: their samples by role, their labels, their domain.

    Args:
        clients: at least one.
        classes: names, one a label; no labels are drawn for clients whose labels were not counted.
    """
    clients = in_groups(clients)
    labelled = labels_known(clients)
    figure = new_canvas(2.4 + (min(3.0, 0.8 + 0.14 * len(classes)) if labelled else 0), width=PANEL)
    ratios = [1.6, *([max(1.3, 0.1 * len(classes))] if labelled else []), 0.18]
    sizes, *middle, strip = figure.subplots(len(ratios), 1, sharex=True, gridspec_kw={"height_ratios": ratios})
    for axes in (sizes, *middle, strip):
        use_page_colours(axes)
    floor = np.zeros(len(clients))
    for role, colour in zip(ROLES, POOL_COLOURS, strict=False):
        top = floor + np.array([client.sizes[ROLES.index(role)] for client in clients])
        # One area instead of a bar a client: the page stays small with thousands of them.
        edges = np.repeat(np.arange(len(clients) + 1) - 0.5, 2)[1:-1]
        sizes.fill_between(edges, np.repeat(floor, 2), np.repeat(top, 2), color=colour, linewidth=0, label=role)
        floor = top
    sizes.set_ylabel("Samples")
    legend(sizes, ncols=3)
    if labelled:
        shares = np.stack([client.labels / max(client.labels.sum(), 1) for client in clients], axis=1)
        smooth = "nearest" if len(clients) < PANEL * DPI / 2 else "antialiased"
        middle[0].imshow(shares, aspect="auto", cmap="Blues", vmin=0, interpolation=smooth)
        few = len(classes) <= MAX_CLASSES
        middle[0].set_yticks(range(len(classes)) if few else [], classes if few else [], size=SMALL - 2)
        middle[0].set_ylabel("Class")
    names = list(dict.fromkeys(client.domain for client in clients))
    numbers = np.array([[names.index(client.domain) for client in clients]])
    colours = ListedColormap(colormaps["tab20"].resampled(20)(np.arange(len(names)) % 20))
    strip.imshow(numbers, aspect="auto", cmap=colours, interpolation="nearest", vmax=len(names) - 0.5)
    strip.set_yticks([0], ["Domain"])
    strip.set_xticks([])
    for axes in (*middle, strip):
        axes.spines[:].set_visible(False)
    pools = list(dict.fromkeys(client.pool for client in clients))
    for index, pool in enumerate(pools):
        own = [place for place, client in enumerate(clients) if client.pool == pool]
        for axes in (sizes, *middle, strip) if index else ():
            axes.axvline(min(own) - 0.5, color=GREY, linewidth=0.8)
        strip.annotate(
            f"{pool} ({len(own)})",
            ((min(own) + max(own)) / 2, 0),
            (0, -10 - 13 * (index % 2)),  # on two lines, so that narrow pools do not touch
            textcoords="offset points",
            ha="center",
            va="top",
            size=SMALL,
            color=INK,
        )
    if 1 < len(names) <= MAX_DOMAINS:
        patches = [Patch(color=colours(place), label=name) for place, name in enumerate(names)]
        style: dict[str, Any] = {"frameon": False, "fontsize": SMALL, "labelcolor": INK, "handlelength": 1.2}
        figure.legend(handles=patches, loc="outside lower center", ncols=3, **style)
    return Drawing("split", "Samples, labels and domains", _caption(labelled), _in_words(clients, pools), figure)


def _caption(labelled: bool) -> str:
    labels = " the shares of the classes (dark: many);" if labelled else ""
    return f"A column a client, by pool, domain and size. Top: samples;{labels} bottom: a colour a domain."


def _in_words(clients: Sequence[ClientSplit], pools: Sequence[str]) -> str:
    said = []
    for pool in pools:
        own = [client for client in clients if client.pool == pool]
        train = [client.sizes[0] for client in own]
        domains = ", ".join(dict.fromkeys(client.domain for client in own))
        skew = f"label skew {label_skew(own):.2f}, " if labels_known(own) else ""
        said.append(f"{pool}: {len(own)} clients of {min(train)} to {max(train)} training samples, {skew}{domains}")
    return "; ".join(said) + "."
