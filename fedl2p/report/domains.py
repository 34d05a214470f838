"""Whether inputs and outputs of the nets follow the clients' domains: the paper's Table 6 and Figures 3 and 5."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedl2p.report.analysis import cluster_agreement, cluster_distance_map
from fedl2p.report.recipes import matrix
from fedl2p.report.saved_run import Row, SavedRun

MAX_CLUSTERED = 1500  # clients; spectral clustering takes the cube of their number


@dataclass(frozen=True)
class Feature:
    """What of a client is compared: an input or an output of one of the nets.

    Attributes:
        symbol: as in the paper.
        net: BNNet or LRNet.
        side: input or output.
        kinds: of the rows.
    """

    symbol: str
    net: str
    side: str
    kinds: tuple[str, ...]


FEATURES = (
    Feature("ξ", "BNNet", "input", ("xi",)),
    Feature("β", "BNNet", "output", ("beta",)),
    Feature("x", "LRNet", "input", ("mean", "sd")),
    Feature("η", "LRNet", "output", ("eta",)),
)


@dataclass(frozen=True)
class Agreement:
    """The adjusted Rand index of one feature among some clients; NaN where there is nothing to compare."""

    feature: Feature
    pool: str
    clients: int
    index: float


def agreements(run: SavedRun) -> list[Agreement]:
    """Table 6 for all clients and for each pool, with scikit-learn's spectral clustering; seed 0.

    Of more clients than `MAX_CLUSTERED` an even choice of them is clustered.
    """
    pools = list(dict.fromkeys(str(row["pool"]) for row in run.recipes))
    found = []
    for pool in [*(["all"] if len(pools) > 1 else []), *pools]:
        for feature, features, domains in _features(run, pool):
            chosen = np.linspace(0, len(domains) - 1, min(len(domains), MAX_CLUSTERED)).round().astype(int)
            own = [domains[i] for i in chosen]
            found.append(Agreement(feature, pool, len(own), cluster_agreement(features[chosen], own, seed=0)))
    return found


def distance_maps(run: SavedRun) -> Iterator[tuple[Feature, list[str], NDArray[Any]]]:
    """Figures 3 and 5 over the clients of all pools: the domains' names, and the map, shape (D, D)."""
    for feature, features, domains in _features(run, "all"):
        if len(set(domains)) > 1:
            names, values = cluster_distance_map(features, domains)
            if np.isfinite(values[~np.eye(len(names), dtype=bool)]).any():
                yield feature, names, values


def _features(run: SavedRun, pool: str) -> Iterator[tuple[Feature, NDArray[np.float64], list[str]]]:
    for feature in FEATURES:
        source: Sequence[Row] = run.recipes if feature.side == "output" else run.net_inputs
        rows = [row for row in source if pool in ("all", row["pool"])]
        names, values = matrix(rows, feature.kinds)
        if len(names) > 1 and values.shape[1]:
            domain = {str(row["client"]): str(row["domain"]) for row in rows}
            yield feature, values, [domain[name] for name in names]


def mean_off_diagonal(values: NDArray[Any]) -> float:
    """The mean of a map's finite entries off the diagonal; NaN where there are none."""
    rest = values[~np.eye(len(values), dtype=bool)]
    rest = rest[np.isfinite(rest)]
    return float(rest.mean()) if rest.size else math.nan
