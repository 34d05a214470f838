"""How data are divided among clients: tables for the terminal, and the picture."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedl2p.pools import ROLES
from fedl2p.report.drawing import DPI, POOL_COLOURS, WIDTH, new_canvas

_BAR = 10  # characters of the longest bar
_SPARKS = " ▁▂▃▄▅▆▇█"
_MAX_COLUMNS = 64  # of a row of sparks


@dataclass(frozen=True, kw_only=True)
class ClientSplit:
    """What one client has.

    Attributes:
        name: the client's.
        pool: pretrain, seen or unseen.
        domain: of its data.
        counts: samples by role and label, shape (3, classes).
        details: numbers of the data module's own, such as a severity.
    """

    name: str
    pool: str
    domain: str
    counts: NDArray[np.int64]
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Samples by label over all roles, shape (classes,)."""
        return np.asarray(self.counts.sum(axis=0))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples by role."""
        return tuple(int(count) for count in self.counts.sum(axis=1))


def labels_known(clients: Iterable[ClientSplit]) -> bool:
    """Whether the labels of all of them were counted: in as many classes, and in more than one."""
    widths = {client.counts.shape[1] for client in clients}
    return len(widths) == 1 and widths != {1}


def label_skew(clients: Sequence[ClientSplit]) -> float:
    """The mean total-variation distance between a client's labels and those of all: 0 alike, towards 1 disjoint."""
    shares = np.stack([client.labels / client.labels.sum() for client in clients])
    together = np.sum([client.labels for client in clients], axis=0)
    return float(0.5 * np.abs(shares - together / together.sum()).sum(axis=1).mean())


def pools_table(clients: Iterable[ClientSplit]) -> Table:
    """A row a pool: clients, domains, samples by role, smallest to largest (median) training set, and `label_skew`."""
    table = _table("Pools", "Pool", "clients", "domains", *ROLES, "train each", "skew")
    for pool, own in _grouped(clients, "pool").items():
        sizes = np.array([client.sizes for client in own])
        low, middle, high = sizes[:, 0].min(), np.median(sizes[:, 0]), sizes[:, 0].max()
        spread = f"{low}" if low == high else f"{low} to {high} ({middle:g})"
        domains = len({client.domain for client in own})
        totals = [str(total) for total in sizes.sum(axis=0)]
        table.add_row(Text(pool), str(len(own)), str(domains), *totals, spread, f"{label_skew(own):.2f}")
    return table


def domains_table(clients: Iterable[ClientSplit]) -> Table:
    """A histogram of domains: clients and samples of each pool."""
    clients = list(clients)
    pools = list(_grouped(clients, "pool"))
    samples = {name: sum(sum(c.sizes) for c in own) for name, own in _grouped(clients, "domain").items()}
    table = _table("Domains by pool", "Domain", *pools, "samples", bars=1)
    for name, own in _grouped(clients, "domain").items():
        counts = [str(sum(client.pool == pool for client in own)) for pool in pools]
        table.add_row(Text(name), *counts, str(samples[name]), _bar(samples[name] / max(samples.values())))
    return table


def labels_table(clients: Iterable[ClientSplit], classes: Sequence[str]) -> Table:
    """A histogram of labels: samples of each pool, all roles together.

    Args:
        clients: of any pools.
        classes: names, one a label.
    """
    groups = _grouped(clients, "pool")
    counts = {pool: np.sum([client.labels for client in own], axis=0) for pool, own in groups.items()}
    table = _table("Labels by pool", "Class", *counts, bars=len(counts))
    for label, name in enumerate(classes):
        numbers = [str(own[label]) for own in counts.values()]
        table.add_row(Text(name), *numbers, *(_bar(own[label] / max(own.max(), 1)) for own in counts.values()))
    return table


def clients_table(clients: Sequence[ClientSplit], *, most: int | None = None) -> Table:
    """A row a client: its sizes, and its labels, from the first to the last, as small bars.

    Args:
        clients: of any pools.
        most: clients of each pool to show; None is all.
    """
    columns = list(dict.fromkeys(key for client in clients for key in client.details if key != "size"))
    table = _table("Clients", "Client", *ROLES, *columns, "labels")
    left_out = []
    for pool, own in _grouped(clients, "pool").items():
        for client in own[:most]:
            details = [_short(client.details.get(key)) for key in columns]
            table.add_row(Text(client.name), *map(str, client.sizes), *details, _sparks(client))
        if most is not None and len(own) > most:
            left_out.append(f"{len(own) - most} more {pool}")
    if left_out:
        table.caption = f"and {', '.join(left_out)} clients; --all shows them"
    return table


def in_groups(clients: Iterable[ClientSplit]) -> list[ClientSplit]:
    """The clients by pool, by domain, and by size."""
    groups = [own for pool in _grouped(clients, "pool").values() for own in _grouped(pool, "domain").values()]
    return [client for own in groups for client in sorted(own, key=lambda client: client.sizes)]


def split_figure(clients: Sequence[ClientSplit], classes: Sequence[str], *, title: str) -> Figure:
    """Clients from left to right, by pool, domain and size: their samples by role, their labels, their domain.

    Args:
        clients: at least one.
        classes: names, one a label.
        title: above all.
    """
    clients = in_groups(clients)
    height = min(12.0, 4.5 + 0.16 * len(classes))
    figure = new_canvas(height)
    ratios = [2.2, max(1.5, 0.14 * len(classes)), 0.25]
    sizes, labels, strip = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": ratios})
    sizes.set_title(title, loc="left", weight="bold")
    x, floor = np.arange(len(clients)), np.zeros(len(clients))
    for role, colour in zip(ROLES, POOL_COLOURS, strict=False):
        heights = np.array([client.sizes[ROLES.index(role)] for client in clients])
        sizes.bar(x, heights, 1.0, bottom=floor, color=colour, label=role)
        floor = floor + heights
    sizes.set_ylabel("Samples")
    sizes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    shares = np.stack([client.labels / client.labels.sum() for client in clients], axis=1)
    # Where clients are narrower than dots, nearest-neighbour drawing would drop some.
    smooth = "nearest" if len(clients) < WIDTH * DPI / 2 else "antialiased"
    shown = labels.imshow(shares, aspect="auto", cmap="Blues", vmin=0, interpolation=smooth)
    labels.set_yticks(range(len(classes)), classes, size=8 if len(classes) <= 20 else 5)
    labels.set_ylabel("Class")
    figure.colorbar(shown, cax=labels.inset_axes((1.03, 0, 0.03, 1)), label="Share of the client")
    _domain_strip(strip, clients)
    for pool, own in _grouped(clients, "pool").items():
        positions = [i for i, client in enumerate(clients) if client.pool == pool]
        for axes in (sizes, labels, strip):
            axes.axvline(max(positions) + 0.5, color="black", linewidth=0.8)
        middle = (min(positions) + max(positions)) / 2
        strip.annotate(
            f"{pool} ({len(own)})", (middle, 0), (0, -16), textcoords="offset points", ha="center", va="top", size=9
        )
    return figure


def _domain_strip(axes: Axes, clients: Sequence[ClientSplit]) -> None:
    names = list(dict.fromkeys(client.domain for client in clients))
    colours = colormaps["tab20"].resampled(20)(np.arange(len(names)) % 20)
    numbers = np.array([[names.index(client.domain) for client in clients]])
    axes.imshow(numbers, aspect="auto", cmap=ListedColormap(colours), interpolation="nearest", vmax=len(names) - 0.5)
    axes.set_yticks([0], ["Domain"])
    axes.set_xticks([])
    if 1 < len(names) <= 20:
        patches = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(names), 7), frameon=False, fontsize=8)


def _table(title: str, first: str, *columns: str, bars: int = 0) -> Table:
    """A table for terminals of 80 characters, with columns without a name for bars at its end."""
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="left" if column == "labels" else "right", no_wrap=True)
    for _ in range(bars):
        table.add_column("", no_wrap=True)
    return table


def _grouped(clients: Iterable[ClientSplit], key: str) -> dict[str, list[ClientSplit]]:
    groups: dict[str, list[ClientSplit]] = {}
    for client in clients:
        groups.setdefault(getattr(client, key), []).append(client)
    return groups


def _bar(share: float) -> Text:
    eighths = round(share * _BAR * 8)
    part = " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return Text("█" * (eighths // 8) + part)


def _sparks(client: ClientSplit) -> Text:
    shares = client.labels / client.labels.max()
    if len(shares) > _MAX_COLUMNS:
        shares = np.array([part.max() for part in np.array_split(shares, _MAX_COLUMNS)])
    return Text("".join(_SPARKS[math.ceil(share * (len(_SPARKS) - 1))] for share in shares))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
