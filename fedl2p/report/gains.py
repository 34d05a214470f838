"""What FedL2P brings each client over the best that the client would get without it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedl2p.report.table import number, pool_names

METHOD = "fedl2p"
# Not what a user would do without FedL2P: what it is compared with to see why it works, or cannot be had.
CONTROLS = ("fedl2p", "mean_recipe", "initial_nets", "oracle")


@dataclass(frozen=True)
class Gain:
    """One client's.

    Attributes:
        client: its name.
        accuracy: with FedL2P, 0 to 1.
        baseline: the method that is best for this client on its test data.
        baseline_accuracy: with that one.
    """

    client: str
    accuracy: float
    baseline: str
    baseline_accuracy: float

    @property
    def points(self) -> float:
        """The gain in percentage points."""
        return 100 * (self.accuracy - self.baseline_accuracy)


def baselines(results: Mapping[str, Any]) -> list[str]:
    """The methods that stand for life without FedL2P: all but itself and its controls."""
    return [name for name in results.get("methods") or {} if not name.startswith(CONTROLS)]


def best_baseline(results: Mapping[str, Any], pool: str) -> str | None:
    """The baseline with the highest mean accuracy on a pool; None where none was measured."""
    methods = results.get("methods") or {}
    means = {
        name: number((((methods[name] or {}).get(pool) or {}).get("accuracy") or {}).get("mean"))
        for name in baselines(results)
    }
    finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return max(finite, key=lambda name: finite[name]) if finite else None


def client_gains(results: Mapping[str, Any], pool: str) -> list[Gain]:
    """Every client's gain over its best baseline, which is chosen with hindsight, on test data, client by client.

    That choice favours the baselines: the best of several noisy measurements is too high on average.

    Returns:
        From the largest loss to the largest gain; clients without a number are left out.
    """
    own, gains = accuracies(results, METHOD, pool), []
    others = {name: accuracies(results, name, pool) for name in baselines(results)}
    for client, accuracy in own.items():
        known = {name: values[client] for name, values in others.items() if client in values}
        if known:
            best = max(known, key=lambda name: known[name])
            gains.append(Gain(client, accuracy, best, known[best]))
    return sorted(gains, key=lambda gain: gain.points)


def accuracies(results: Mapping[str, Any], method: str, pool: str) -> dict[str, float]:
    """The accuracy of each client of a pool with a method; clients without a finite one are left out."""
    measured = ((results.get("methods") or {}).get(method) or {}).get(pool)
    clients = (measured.get("clients") if isinstance(measured, Mapping) else None) or {}
    values = {str(name): number((entry or {}).get("accuracy")) for name, entry in clients.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


@dataclass(frozen=True)
class GainSummary:
    """A group of clients: how many, the mean gain in points, and for how many FedL2P is better, equal, worse."""

    count: int
    mean: float
    better: int
    equal: int
    worse: int


def summarize(gains: Sequence[Gain]) -> GainSummary:
    """Of at least one gain; equal is within a ten-thousandth of a point."""
    points = [gain.points for gain in gains]
    better, worse = (sum(sign * value > 1e-4 for value in points) for sign in (1, -1))
    mean = sum(points) / len(points)
    return GainSummary(len(points), mean, better, len(points) - better - worse, worse)


def gains_by_domain(
    results: Mapping[str, Any], who: Mapping[str, tuple[str, str]], pools: Iterable[str] | None = None
) -> dict[tuple[str, str], GainSummary]:
    """Summaries by (pool, domain).

    Args:
        results: as in `results.json`.
        who: pool and domain by client.
        pools: which; None is all that were measured.
    """
    groups: dict[tuple[str, str], list[Gain]] = {}
    for pool in pool_names(results) if pools is None else pools:
        for gain in client_gains(results, pool):
            groups.setdefault((pool, who.get(gain.client, ("", "all"))[1]), []).append(gain)
    return {key: summarize(groups[key]) for key in sorted(groups)}
