"""What the results say: intervals, sparsity, and how well hyperparameters follow the clients' domains."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import pdist, squareform
from scipy.stats import bootstrap

from fedl2p.errors import DataError

Array = NDArray[np.float64]


def paired_bootstrap(
    differences: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of paired differences and its percentile bootstrap interval.

    Args:
        differences: one a client, method a minus method b, shape (clients,).
        resamples: how many times the clients are drawn anew, with replacement.
        confidence: of the interval, 0 to 1.
        seed: the same seed, the same interval.

    Returns:
        (mean, low, high), in the unit of the differences. Low and high are NaN with a single client, which says
        nothing about others; equal differences give an interval without width.

    Raises:
        DataError: no differences, or one that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64).reshape(-1)
    if not values.size or not np.isfinite(values).all():
        raise DataError(f"The {values.size} paired differences must be at least one and all finite.")
    mean = float(values.mean())
    if values.size == 1:
        return mean, float("nan"), float("nan")
    if np.ptp(values) == 0:
        return mean, mean, mean
    interval = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return mean, float(interval.low), float(interval.high)


def sparsity(eta: ArrayLike, *, sizes: Sequence[int] | None = None) -> float:
    """The share of learning rates that are exactly 0: of the model that fine-tuning leaves as it was.

    Args:
        eta: shape (..., P); the share is over all entries.
        sizes: number of values in each of the P tensors; with them, the share of the model's values.

    Returns:
        0 (all are trained) to 1 (none is).

    Raises:
        DataError: no entries, or a number of sizes other than P.
    """
    values = np.atleast_1d(np.asarray(eta, dtype=np.float64))
    if not values.size or (sizes is not None and len(sizes) != values.shape[-1]):
        given = "no" if sizes is None else len(sizes)
        raise DataError(
            f"eta has the shape {values.shape} and {given} sizes; its last axis needs a size for each entry."
        )
    zeros = (values == 0).reshape(-1, values.shape[-1]).mean(0)
    return float(np.average(zeros, weights=sizes))


def spread(values: ArrayLike) -> dict[str, float]:
    """How a measure is spread over the clients.

    Args:
        values: one a client, shape (clients,).

    Returns:
        mean, sd (of these clients, divided by their number), median, min, max; all NaN without values or where a
        value is NaN, since a mean over the rest would flatter.
    """
    given = np.asarray(values, dtype=np.float64).reshape(-1)
    if not given.size or np.isnan(given).any():
        return dict.fromkeys(("mean", "sd", "median", "min", "max"), float("nan"))
    with np.errstate(invalid="ignore"):  # an infinite loss has no SD
        return {
            "mean": float(given.mean()),
            "sd": float(given.std()),
            "median": float(np.median(given)),
            "min": float(given.min()),
            "max": float(given.max()),
        }


def cluster_agreement(features: ArrayLike, domains: Sequence[str], seed: int) -> float:
    """The adjusted Rand index between the clients' domains and a spectral clustering of them (the paper's Table 6).

    Spectral clustering is scikit-learn's, into as many clusters as there are domains, with the paper's `discretize`
    step and the defaults otherwise. Its default similarity exp(-distance^2) has a unit, in which raw xi are all
    infinitely far apart and raw eta all the same, so distances are first divided by their mean over all pairs.

    Args:
        features: a row a client: xi, layer moments, beta or eta, shape (clients, F).
        domains: of the clients.
        seed: of the clustering.

    Returns:
        1 where the clusters are the domains, about 0 where they are unrelated (0 for rows that are all the same), NaN
        where the question is empty: fewer than two domains, or no more clients than domains.

    Raises:
        DataError: features that are not finite, or not a row for every client.
    """
    from sklearn.cluster import SpectralClustering
    from sklearn.metrics import adjusted_rand_score

    distances = _distances(features, domains)
    count = len(set(domains))
    if count < 2 or len(domains) <= count:
        return float("nan")
    scale = distances.sum() / (len(domains) * (len(domains) - 1))
    if scale == 0:
        return 0.0
    similarity = np.exp(-np.square(distances / scale))
    clustering: Any = SpectralClustering(
        count, affinity="precomputed", assign_labels="discretize", random_state=seed, n_jobs=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # far clients make an unconnected graph, which is what is being asked
        labels = clustering.fit_predict(similarity)
    return float(adjusted_rand_score(list(domains), labels))


def cluster_distance_map(features: ArrayLike, domains: Sequence[str]) -> tuple[list[str], Array]:
    """Distances between domains over those within (the paper's section 4.4, Figures 3 and 5).

    With d(j, k) the mean Euclidean distance over all pairs of clients of domains j and k (for j = k, over pairs of
    different clients), the map is log(d(j, k) / sqrt(d(j, j) d(k, k))). Above 0: domain j is further from k than
    its own clients are from each other.

    Args:
        features: a row a client: xi, layer moments, beta or eta, shape (clients, F).
        domains: of the clients.

    Returns:
        The D names, sorted, and the map (D, D), symmetric with a diagonal of 0. A domain with one client has no
        distance within, so its row and column are NaN. A domain whose clients are all the same has the distance 0
        within: its diagonal is NaN and the rest of its row and column +inf, or NaN towards another with the same rows.

    Raises:
        DataError: features that are not finite, or not a row for every client.
    """
    distances = _distances(features, domains)
    names = sorted(set(domains))
    # (D, clients): who belongs where. Pairs of a client with itself add 0 to a sum and are taken from its count.
    members = np.array([[domain == name for domain in domains] for name in names], dtype=np.float64)
    sizes = members.sum(1)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = members @ distances @ members.T / pairs
        within = np.diag(mean)
        normalized: Array = np.log(mean / np.sqrt(np.outer(within, within)))
    return names, normalized


def _distances(features: ArrayLike, domains: Sequence[str]) -> Array:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(domains) or not len(rows) or not np.isfinite(rows).all():
        raise DataError(
            f"The features have the shape {rows.shape} for {len(domains)} clients; needed is a finite row for each."
        )
    return np.asarray(squareform(pdist(rows)), dtype=np.float64)
