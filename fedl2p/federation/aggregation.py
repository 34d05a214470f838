"""How the answers of many clients become one, so that no single client decides."""

from collections.abc import Sequence
from typing import Literal

import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum
from scipy import stats

from fedl2p.core.functional import Tensors
from fedl2p.federation.messages import ARRAYS, META_TRAIN, METRICS, from_arrays, to_arrays

AGGREGATIONS = ("mean", "median", "trimmed_mean", "krum")

TRIMMED_SHARE = 0.35  # of the numbers at either end, left out of a trimmed mean
# An update may be so many times as long as the median one. Honest clients differ a lot: on the digits the longest one
# of a round was up to 47 times as long, late in the rounds, when most clients hardly move.
CLIP_RATIO = 100.0
MIN_UPDATES = 3  # updates that a median of norms says something about


class WeightedMean:
    """The mean of tensors by name with weights, summed in float64 as they come, so that one set is held, not all."""

    def __init__(self) -> None:
        """Starts with nothing."""
        self.weight = 0.0
        self._sums: Tensors = {}
        self._like: Tensors = {}

    def add(self, weight: float, tensors: Tensors) -> None:
        """Takes one set in."""
        if not self._like:
            self._like = tensors
            self._sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in tensors.items()}
        self.weight += weight
        for name, total in self._sums.items():
            total.add_(tensors[name], alpha=weight)

    def result(self) -> Tensors:
        """The mean, in the types of the first set; integers are rounded."""
        means = {name: total / self.weight for name, total in self._sums.items()}
        return {
            name: (mean if self._like[name].is_floating_point() else mean.round()).to(self._like[name])
            for name, mean in means.items()
        }


def combine(start: Tensors, lambdas: Sequence[Tensors], weights: Sequence[float], aggregation: str) -> Tensors:
    """One lambda of many.

    Args:
        start: the lambda that all clients began with.
        lambdas: what they made of it, at least one.
        weights: one a client; only the mean looks at them, since a robust choice cannot trust them.
        aggregation: `mean` is Algorithm 1's. The others are Flower's: the median or a trimmed mean of each number, or
            the one update that lies nearest to its neighbours (Krum).

    Returns:
        The new lambda, in the types of `start`.
    """
    if aggregation == "mean":
        mean = WeightedMean()
        for weight, lambda_ in zip(weights, lambdas, strict=True):
            mean.add(weight, lambda_)
        return mean.result()
    # Differences in float64: distances between long, nearly equal vectors would be lost to rounding.
    updates = [_difference(lambda_, start) for lambda_ in lambdas]
    middle = _by_flower(_robust(aggregation, len(updates)), updates)
    return {name: (t.double() + middle[name]).to(t) for name, t in start.items()}


def _robust(aggregation: str, count: int) -> FedAvg:
    """Flower's strategy of that name, set up for as many liars among `count` clients as it can bear."""
    if aggregation == "median":
        return FedMedian()
    if aggregation == "trimmed_mean":
        return FedTrimmedAvg(beta=TRIMMED_SHARE)
    return Krum(num_malicious_nodes=max(0, (count - 3) // 2))


def _by_flower(strategy: FedAvg, updates: Sequence[Tensors]) -> Tensors:
    key = strategy.weighted_by_key
    messages = [
        Message(RecordDict({ARRAYS: to_arrays(update), METRICS: MetricRecord({key: 1})}), node, META_TRAIN)
        for node, update in enumerate(updates, start=1)
    ]
    arrays, _ = strategy.aggregate_train(0, messages)
    assert arrays is not None
    return from_arrays(arrays, updates[0])


def clip_updates(
    start: Tensors, lambdas: Sequence[Tensors], max_norm: float | Literal["auto"] | None
) -> tuple[list[Tensors], list[int]]:
    """Shortens updates that are too long, so that one client cannot move lambda wherever it likes.

    Args:
        start: the lambda that all clients began with.
        lambdas: what they made of it.
        max_norm: the longest update, as the Euclidean norm over all of lambda. `auto` is `CLIP_RATIO` times the median
            norm of those that moved, which only says something where there are three or more; None is no limit.

    Returns:
        The lambdas, and the positions of those that were shortened; the others are the same objects.
    """
    norms = [float(sum(t.square().sum() for t in _difference(lambda_, start).values())) ** 0.5 for lambda_ in lambdas]
    if max_norm == "auto":
        moved = [norm for norm in norms if norm > 0]
        max_norm = CLIP_RATIO * float(torch.tensor(moved).median()) if len(moved) >= MIN_UPDATES else None
    if max_norm is None:
        return list(lambdas), []
    clipped = [position for position, norm in enumerate(norms) if norm > max_norm]
    result = list(lambdas)
    for position in clipped:
        share = max_norm / norms[position]
        update = _difference(lambdas[position], start)
        result[position] = {name: (t.double() + share * update[name]).to(t) for name, t in start.items()}
    return result, clipped


def _difference(lambda_: Tensors, start: Tensors) -> Tensors:
    return {name: t.double() - start[name].double() for name, t in lambda_.items()}


def bound_weights(weights: Sequence[float], max_share: float) -> list[float]:
    """Lowers the largest weights until none is more than a share of their sum.

    Where there are so few that somebody must have more, all are equal. Weights that keep the bound stay as they are.

    Args:
        weights: positive.
        max_share: above 0 and at most 1.
    """
    if max_share * len(weights) <= 1:
        return list(weights) if max_share == 1 else [1.0] * len(weights)
    ordered = sorted(weights, reverse=True)
    rest = float(sum(ordered))
    for count, weight in enumerate(ordered):
        # With `count` weights at the bound, the bound is this share of what the others weigh.
        bound = max_share * rest / (1 - count * max_share)
        if weight <= bound:
            return [min(float(w), bound) if count else w for w in weights]
        rest -= weight
    raise AssertionError("the smallest weight is below the mean")


def middle(values: Sequence[float], weights: Sequence[float], aggregation: str) -> float:
    """One number of many: the weighted mean, or a trimmed mean without weights where the aggregation is robust."""
    if aggregation == "mean":
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    return float(stats.trim_mean(values, TRIMMED_SHARE))
