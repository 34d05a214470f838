"""Dividing a labelled data set: among clients with skewed label proportions, and into roles.

Everything is random only through the generator that is passed in. Dirichlet label skew follows Hsu, Qi and
Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification" (2019).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

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

    Where the supply suffices for all clients, each has its shares, rounded up or down. Elsewhere clients are served
    one after the other in a random order: where a class runs out, its share goes to the client's other classes in
    proportion, and where those run out too, to whatever is left. Time is bounded: nothing is redrawn.

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
    counts = _exact_counts(weights, wanted, supply, rng)
    if counts is None:
        counts = _served_in_turn(weights, wanted, supply, rng)
    ends = np.cumsum(counts, axis=0) + (np.cumsum(supply) - supply)
    return [
        np.sort(np.concatenate([queue[end - n : end] for end, n in zip(*row, strict=True)]))
        for row in zip(ends, counts, strict=True)
    ]


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


def client_roles(
    labels: ArrayLike, val_fraction: float, test_fraction: float, rng: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray]:
    """Splits one client's samples into train, val and test with the labels of the whole, each of at least one sample.

    Args:
        labels: Class numbers of the client's samples, shape ``(n,)``, from 0.
        val_fraction: Share of *all* the samples, in (0, 1).
        test_fraction: As `val_fraction`, together below 1; 0 gives an empty test set, for data with a split of its own.
        rng: Source of randomness.

    Returns:
        Indices into `labels` of train, val and test, ascending.

    Raises:
        DataError: If there are fewer samples than roles, or a fraction is not as above.
    """
    if not (val_fraction > 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise DataError(
            f"The fractions of val and test are {val_fraction} and {test_fraction}; they must be above 0 (test may be "
            "0) and together below 1."
        )
    fractions = [1 - val_fraction - test_fraction, val_fraction, test_fraction]
    wanted = sum(fraction > 0 for fraction in fractions)
    if np.size(labels) < wanted:
        raise DataError(f"A client has {np.size(labels)} samples; it needs at least {wanted}, one a role.")
    train, val, test = stratified_roles(labels, fractions, rng)
    roles = {"train": train, "val": val, "test": test}
    for name, fraction in zip(roles, fractions, strict=True):
        if fraction > 0 and not len(roles[name]):
            giver = max(roles, key=lambda role: len(roles[role]))
            moved = rng.choice(roles[giver], size=1)
            roles[name], roles[giver] = moved, np.setdiff1d(roles[giver], moved)
    return roles["train"], roles["val"], roles["test"]


def dirichlet_clients(
    labels: ArrayLike,
    num_clients: int,
    alpha: float | None,
    rng: np.random.Generator,
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
    test_labels: ArrayLike | None = None,
    client_size: int | None = None,
) -> list[tuple[IntArray, IntArray, IntArray]]:
    """Deals a data set to clients of equal size with Dirichlet label skew, each with train, val and test sets.

    Args:
        labels: Class numbers, shape ``(n,)``, from 0. Each client gets ``n // num_clients`` of these samples.
        num_clients: At least 1.
        alpha: Concentration, above 0. None gives every client the labels of the whole, which is not what a large
            alpha does where classes differ in size: that asks for even classes until the small ones run out.
        rng: Source of randomness.
        val_fraction: See `client_roles`.
        test_fraction: See `client_roles`; 0 where `test_labels` are given.
        test_labels: Of a separate supply of test samples, shape ``(m,)``: each client gets ``m // num_clients`` of
            them, with the labels of its other samples as far as the supply goes.
        client_size: How many of the samples of `labels` each client gets, if not ``n // num_clients``. A client's
            labels need then not be found in the test supply as often as ``m // num_clients`` asks for, and all clients
            get as many test samples as there are of the labels that each trains on.

    Returns:
        For each client its train, val and test indices, ascending; those of test are into `test_labels` where given.

    Raises:
        DataError: If there are fewer samples than clients, or an argument is not as above.
    """
    label_array = _checked_labels(labels)
    sizes = _equal_sizes(len(label_array), num_clients) if client_size is None else np.full(num_clients, client_size)
    if alpha is None:
        parts = partition_by_proportions(label_array, np.tile(np.bincount(label_array), (num_clients, 1)), sizes, rng)
    else:
        parts = dirichlet_partition(label_array, sizes, alpha, rng)
    roles = [client_roles(label_array[part], val_fraction, test_fraction, rng) for part in parts]
    clients = [(part[train], part[val], part[test]) for part, (train, val, test) in zip(parts, roles, strict=True)]
    if test_labels is None:
        return clients
    test_array = _checked_labels(test_labels)
    num_classes = max(int(label_array.max()), int(test_array.max())) + 1
    # Where all samples are dealt out the test supply suffices for the labels of each; elsewhere it need not.
    followed = parts if client_size is None else [train for train, _, _ in clients]
    held = np.stack([np.bincount(label_array[own], minlength=num_classes) for own in followed])
    test_sizes = _equal_sizes(len(test_array), num_clients)
    if client_size is not None:
        usual = client_size * len(test_array) // len(label_array)
        test_sizes = np.full(num_clients, _test_size(held, test_array, int(test_sizes[0]), usual))
    tests = partition_by_proportions(test_array, held, test_sizes, rng)
    return [(train, val, test) for (train, val, _), test in zip(clients, tests, strict=True)]


def _test_size(held: IntArray, test_labels: IntArray, most: int, usual: int) -> int:
    """How many test samples each client can have so that their labels are those that it holds; all have as many.

    Args:
        held: Samples by client and class, shape (clients, classes).
        test_labels: The supply, shape (m,).
        most: The limit.
        usual: What a client would have by the shares of training and test samples in the whole. Where a class is so
            rare in the supply that not even half of that can be had, clients have this many, and other labels.
    """
    shares = (held / held.sum(axis=1, keepdims=True)).sum(axis=0)
    wanted = shares > 0
    supply = np.bincount(test_labels, minlength=held.shape[1])
    enough = int((supply[wanted] / shares[wanted]).min() + 1e-9)
    return max(1, min(most, enough if 2 * enough >= usual else usual))


def _equal_sizes(num_samples: int, num_clients: int) -> IntArray:
    if not 1 <= num_clients <= num_samples:
        raise DataError(f"{num_clients} clients are to share {num_samples} samples; there must be 1 to {num_samples}.")
    return np.full(num_clients, num_samples // num_clients)


def _exact_counts(weights: FloatArray, sizes: IntArray, supply: IntArray, rng: np.random.Generator) -> IntArray | None:
    """Every client's shares, rounded up or down so that each has its size and no class runs out.

    Such a rounding exists where the shares themselves keep to the supply; None where they do not. Each client's largest
    fractions are rounded up, unless a class runs out by that: then what is rounded up is found as a maximal flow from
    clients (who are to be given a few more) to classes (which still have some).
    """
    shares = np.round(weights / weights.sum(axis=1, keepdims=True) * sizes[:, None], _DECIMALS)
    floors = np.floor(shares).astype(np.int64)
    if (shares.sum(axis=0) > supply + 1e-6).any():
        return None
    counts = np.stack([_whole_numbers(row, 1e-10 * rng.random(len(row))) for row in shares])  # the bias breaks ties
    if (counts.sum(axis=0) <= supply).all():
        return counts
    clients, classes = np.nonzero(shares > floors)
    num_clients, num_classes = shares.shape
    source, sink = num_clients + num_classes, num_clients + num_classes + 1
    left, spare = sizes - floors.sum(axis=1), supply - floors.sum(axis=0)
    starts = [np.full(num_clients, source), clients, num_clients + np.arange(num_classes)]
    ends = [np.arange(num_clients), num_clients + classes, np.full(num_classes, sink)]
    capacities = np.concatenate([left, np.ones(len(clients), dtype=np.int64), spare]).astype(np.int32)
    edges = (capacities, (np.concatenate(starts), np.concatenate(ends)))
    found = maximum_flow(csr_matrix(edges, shape=(sink + 1, sink + 1)), source, sink)
    if found.flow_value < left.sum():
        return None
    flow = found.flow[:num_clients, num_clients : num_clients + num_classes].toarray()
    return floors + np.maximum(flow, 0)


def _served_in_turn(weights: FloatArray, sizes: IntArray, supply: IntArray, rng: np.random.Generator) -> IntArray:
    """Each client's samples by class, where a supply that is too small makes late clients take what is left."""
    counts = np.zeros(weights.shape, dtype=np.int64)
    left = supply.copy()
    for client in rng.permutation(len(sizes)):
        shares = _shares(weights[client], left, int(sizes[client]))
        counts[client] = _whole_numbers(shares, 1e-10 * rng.random(len(shares)))  # the bias only breaks ties
        left -= counts[client]
    return counts


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
