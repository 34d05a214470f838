"""Dividing a labelled data set: among clients with skewed label proportions, and into roles.

Everything is random only through the generator that is passed in. Dirichlet label skew follows Hsu, Qi and
Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification" (2019).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedl2p.errors import DataError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# Shares this close to a whole number are one: a float sum must not decide who gets a sample.
_DECIMALS = 9


def label_proportions(num_clients: int, num_classes: int, alpha: float, rng: np.random.Generator) -> FloatArray:
    """Draws each client's label proportions from a symmetric Dirichlet distribution.

    Args:
        num_clients: Rows to draw.
        num_classes: Entries of a row.
        alpha: Concentration, above 0: near 0 a client has one class, at 1000 all classes evenly.
        rng: Source of randomness.

    Returns:
        Shape ``(num_clients, num_classes)``; each row sums to 1.

    Raises:
        DataError: If a number is below 1, or `alpha` is not a positive number.
    """
    if num_clients < 1 or num_classes < 1:
        raise DataError(f"{num_clients} clients and {num_classes} classes were asked for; both must be at least 1.")
    if not (np.isfinite(alpha) and alpha > 0):
        raise DataError(f"The Dirichlet alpha is {alpha}; it must be a positive number.")
    rows = rng.dirichlet(np.full(num_classes, alpha), size=num_clients)
    # Gamma draws at a tiny alpha may all underflow; the limit of the distribution is then a single class.
    single = np.eye(num_classes)[rng.integers(num_classes, size=num_clients)]
    usable = np.isfinite(rows).all(axis=1) & (np.abs(rows.sum(axis=1) - 1) < 1e-6)
    return np.where(usable[:, None], rows, single)


def partition_by_proportions(
    labels: ArrayLike, proportions: ArrayLike, sizes: ArrayLike, rng: np.random.Generator
) -> list[IntArray]:
    """Deals samples to clients, each client's labels as near to its proportions as the supply allows.

    Clients are served one after the other in a random order. Where a class runs out, its share goes to the
    client's other classes in proportion, and where those run out too, to whatever is left. Time is bounded:
    nothing is redrawn.

    Args:
        labels: Class numbers, shape ``(n,)``, from 0 to ``num_classes - 1``.
        proportions: Shape ``(num_clients, num_classes)``, not negative; a row may have any sum above 0.
        sizes: Samples of each client, shape ``(num_clients,)``, at least 1; together at most n.
        rng: Source of randomness.

    Returns:
        For each client its ``sizes[i]`` indices into `labels`, ascending; no index occurs twice.

    Raises:
        DataError: If shapes or values are not as above, or the clients want more than there is.
    """
    label_array, wanted = _checked_labels(labels), np.asarray(sizes, dtype=np.int64)
    weights = np.asarray(proportions, dtype=np.float64)
    _check_demand(label_array, weights, wanted)
    supply = np.bincount(label_array, minlength=weights.shape[1])
    # One shuffled queue a class, end to end: a client takes the next ones of each queue.
    shuffled = rng.permutation(len(label_array))
    queue = shuffled[np.argsort(label_array[shuffled], kind="stable")]
    front = np.cumsum(supply) - supply
    parts: list[IntArray] = [np.empty(0, dtype=np.int64)] * len(wanted)
    for client in rng.permutation(len(wanted)):
        shares = _shares(weights[client], supply, int(wanted[client]))
        counts = _whole_numbers(shares, 1e-10 * rng.random(len(shares)))  # the bias only breaks ties
        parts[client] = np.sort(np.concatenate([queue[at : at + n] for at, n in zip(front, counts, strict=True)]))
        front += counts
        supply -= counts
    return parts


def dirichlet_partition(labels: ArrayLike, sizes: ArrayLike, alpha: float, rng: np.random.Generator) -> list[IntArray]:
    """Deals samples to clients with Dirichlet label skew: `label_proportions`, `partition_by_proportions`.

    Args:
        labels: Class numbers, shape ``(n,)``, from 0.
        sizes: Samples of each client, shape ``(num_clients,)``, at least 1; together at most n.
        alpha: Concentration, above 0.
        rng: Source of randomness.

    Returns:
        For each client its ``sizes[i]`` indices into `labels`, ascending; no index occurs twice.

    Raises:
        DataError: As the two functions do.
    """
    label_array = _checked_labels(labels)
    num_classes = int(label_array.max()) + 1
    proportions = label_proportions(np.size(sizes), num_classes, alpha, rng)
    return partition_by_proportions(label_array, proportions, sizes, rng)


def stratified_roles(labels: ArrayLike, fractions: Sequence[float], rng: np.random.Generator) -> list[IntArray]:
    """Splits samples into disjoint parts that each have the labels of the whole.

    Each class gives every part its fraction rounded down or up; which parts are rounded up is chosen so that
    the parts' total sizes keep to the fractions as well.

    Args:
        labels: Class numbers, shape ``(n,)``, from 0.
        fractions: A part's share of the samples, each in [0, 1], together at most 1; the rest is left out.
        rng: Source of randomness.

    Returns:
        For each part its indices into `labels`, ascending.

    Raises:
        DataError: If labels or fractions are not as above.
    """
    label_array, parts = _checked_labels(labels), np.asarray(fractions, dtype=np.float64)
    if parts.ndim != 1 or not ((parts >= 0).all() and parts.sum() <= 1 + 1e-9):
        raise DataError(f"The fractions are {list(fractions)}; each must be in [0, 1] and all together at most 1.")
    parts = np.append(parts, max(0.0, 1 - parts.sum()))
    role = np.empty(len(label_array), dtype=np.int64)
    owed = np.zeros(len(parts))
    for label in np.unique(label_array):
        members = rng.permutation(np.flatnonzero(label_array == label))
        shares = len(members) * parts / parts.sum()
        counts = _whole_numbers(shares, owed)
        owed += shares - counts
        role[members] = np.repeat(np.arange(len(parts)), counts)
    return [np.flatnonzero(role == part) for part in range(len(parts) - 1)]


def _shares(weights: FloatArray, supply: IntArray, size: int) -> FloatArray:
    """Fractional shares of the classes, as the weights but within the supply, that sum to `size`."""
    shares = np.zeros(len(supply))
    # The second round is for a client whose own classes have all run out.
    for preference in (weights, supply):
        open_classes = (preference > 0) & (shares < supply)
        while open_classes.any():
            left = size - shares[~open_classes].sum()
            weight = np.where(open_classes, preference, 0.0)
            weight /= weight.max()  # keeps the sum of very small weights exact
            offer = left * weight / weight.sum()
            exhausted = open_classes & (offer >= supply)
            shares = np.where(exhausted, supply, np.where(open_classes, offer, shares))
            if not exhausted.any():
                return shares
            open_classes &= ~exhausted
    return shares


def _whole_numbers(shares: FloatArray, bias: FloatArray) -> IntArray:
    """Rounds shares down or up, keeping their whole sum; the largest of fraction + bias go up."""
    rounded = np.round(shares, _DECIMALS)
    counts = np.floor(rounded).astype(np.int64)
    fractions = rounded - counts
    left = round(float(shares.sum())) - int(counts.sum())
    # A whole share is never rounded up: it may be all that the supply has.
    priority = np.where(fractions > 0, fractions + bias, -np.inf)
    counts[np.argsort(-priority, kind="stable")[:left]] += 1
    return counts


def _checked_labels(labels: ArrayLike) -> IntArray:
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise DataError(
            f"Labels of type {array.dtype} and shape {array.shape} were given; "
            "they must be a non-empty list of whole numbers from 0."
        )
    return array.astype(np.int64)


def _check_demand(labels: IntArray, proportions: FloatArray, sizes: IntArray) -> None:
    if sizes.ndim != 1 or proportions.ndim != 2 or len(sizes) != len(proportions):
        raise DataError(
            f"Sizes of shape {sizes.shape} and proportions of shape {proportions.shape} were given; "
            "they must be (clients,) and (clients, classes)."
        )
    if not (np.isfinite(proportions).all() and (proportions >= 0).all() and proportions.any(axis=1).all()):
        raise DataError("A client's label proportions are not usable; they must be numbers from 0, not all 0.")
    if labels.max() >= proportions.shape[1]:
        raise DataError(
            f"There is a label {labels.max()}, but proportions are given for only {proportions.shape[1]} classes."
        )
    if (sizes < 1).any():
        raise DataError(f"A client is to have {sizes.min()} samples; it must be at least 1.")
    if sizes.sum() > len(labels):
        raise DataError(
            f"The clients want {sizes.sum()} samples together, but there are {len(labels)}; "
            "ask for fewer clients or smaller ones."
        )
