"""The clients' beta and eta, layer by layer: their spread, the layers at a limit, and the model's sparsity."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedl2p.report.analysis import sparsity
from fedl2p.report.table import number

Kind = Literal["beta", "eta"]
KINDS: tuple[Kind, ...] = ("beta", "eta")
LIMITS: dict[str, tuple[float, ...]] = {"beta": (0.0, 1.0), "eta": (0.0,)}
MANY = 0.5  # a layer is at a limit where this share of the clients is


@dataclass(frozen=True)
class LayerSpread:
    """One layer's beta or eta over clients.

    Attributes:
        layer: its name.
        clients: names, where the value is finite.
        values: theirs, shape (clients,).
    """

    layer: str
    clients: tuple[str, ...]
    values: NDArray[np.float64]

    @property
    def quartiles(self) -> tuple[float, float, float, float, float]:
        """Minimum, lower quartile, median, upper quartile and maximum."""
        low, first, middle, third, high = (float(v) for v in np.quantile(self.values, (0, 0.25, 0.5, 0.75, 1)))
        return low, first, middle, third, high

    def share_at(self, limit: float) -> float:
        """Of the clients whose value is the limit."""
        return float(np.mean(np.isclose(self.values, limit, rtol=0, atol=1e-7)))


def layer_spreads(rows: Iterable[Mapping[str, Any]], kind: str) -> list[LayerSpread]:
    """Beta or eta by layer, layers in the order of the rows; values that are not finite are left out."""
    found: dict[str, tuple[list[str], list[float]]] = {}
    for row in rows:
        value = number(row["value"])
        if row["kind"] == kind and math.isfinite(value):
            names, values = found.setdefault(str(row["layer"]), ([], []))
            names.append(str(row.get("client", "")))
            values.append(value)
    return [LayerSpread(layer, tuple(names), np.asarray(values)) for layer, (names, values) in found.items()]


def at_limits(rows: Iterable[Mapping[str, Any]]) -> list[tuple[Kind, str, float, float]]:
    """The layers where at least half of the clients are at a limit: kind, layer, limit, share of the clients.

    Beta is limited to 0 (pretrained statistics alone) and 1 (the client's alone); an eta of 0 leaves its tensor as it
    was.
    """
    rows = list(rows)
    found = []
    for kind in KINDS:
        for spread in layer_spreads(rows, kind):
            found += [
                (kind, spread.layer, limit, spread.share_at(limit))
                for limit in LIMITS[kind]
                if spread.share_at(limit) >= MANY
            ]
    return found


def model_sparsity(rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, int] | None = None) -> float:
    """The share of the model that fine-tuning leaves as it was, over all clients of the rows.

    Args:
        rows: of `hyperparameter_rows`; those of eta count.
        sizes: values in each tensor by name; without all of them every tensor counts alike.

    Returns:
        0 to 1; NaN without rows of eta.
    """
    spreads = layer_spreads(rows, "eta")
    if not spreads:
        return math.nan
    known = sizes is not None and all(spread.layer in sizes for spread in spreads)
    weights = [sizes[spread.layer] if known and sizes else 1 for spread in spreads]
    shares = [sparsity(spread.values[:, None]) for spread in spreads]
    return float(np.average(shares, weights=weights))


def by_domain(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each domain, domains by name."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("domain", "all")), []).append(row)
    return dict(sorted(groups.items()))


def matrix(rows: Iterable[Mapping[str, Any]], kinds: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """A row a client with its values of some kinds, for clustering.

    Args:
        rows: in long form.
        kinds: such as `("mean", "sd")`.

    Returns:
        The clients' names, in order, and their values, shape (clients, F); clients that lack a value, or have one that
        is not finite, are left out.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] in kinds:
            values.setdefault(str(row["client"]), []).append(number(row["value"]))
    length = max((len(own) for own in values.values()), default=0)
    whole = {name: own for name, own in values.items() if len(own) == length and np.isfinite(own).all()}
    return list(whole), np.array(list(whole.values()), dtype=np.float64).reshape(len(whole), length)
