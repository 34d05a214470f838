"""How many answers become one, against numbers made by hand."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedl2p.federation.aggregation import (
    CLIP_RATIO,
    TRIMMED_SHARE,
    bound_weights,
    clip_updates,
    combine,
    middle,
)
from fedl2p.federation.local import flower_run
from fedl2p.federation.rounds import is_ruined


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    with flower_run():
        yield


def lambdas(*values: float) -> list[dict[str, Tensor]]:
    return [{"a": torch.tensor([value, 2 * value]), "scalar": torch.tensor(-value)} for value in values]


START = lambdas(1.0)[0]


def combined(aggregation: Any, *values: float) -> dict[str, Tensor]:
    return combine(START, lambdas(*values), [1.0] * len(values), aggregation)


def test_the_mean_is_weighted() -> None:
    result = combine(START, lambdas(1.0, 4.0), [3.0, 1.0], "mean")
    assert torch.equal(result["a"], torch.tensor([1.75, 3.5]))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("median", 1.3),
        # 0.35 of 7 numbers are 2 at either end.
        ("trimmed_mean", (1.2 + 1.3 + 1.31) / 3),
        ("krum", 1.2),
    ],
)
def test_robust_choices_are_the_field_s_own(aggregation: str, expected: float) -> None:
    result = combined(aggregation, 1.1, 1.2, 1.31, 1.3, 1.5, 1e6, -1e6)
    for name, t in lambdas(expected)[0].items():
        torch.testing.assert_close(result[name], t, rtol=1e-6, atol=0)
        assert (result[name].dtype, result[name].shape) == (START[name].dtype, START[name].shape)


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "krum"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_robust_choices_of_few_are_possible(aggregation: str, count: int) -> None:
    result = combined(aggregation, *[1.5] * count)
    torch.testing.assert_close(result, lambdas(1.5)[0])


def test_krum_tells_small_updates_of_large_lambdas_apart() -> None:
    """In float32, distances between the lambdas themselves would all be rounding."""
    start = {"a": torch.full((50,), 1e3)}
    steps = [1e-3, 1.1e-3, 1.2e-3, -8e-3, 9e-3]
    result = combine(start, [{"a": start["a"] + step} for step in steps], [1.0] * 5, "krum")
    assert float(result["a"][0] - 1e3) == pytest.approx(1.1e-3, abs=1e-4)


def test_updates_longer_than_the_bound_are_shortened_and_keep_their_direction() -> None:
    given = lambdas(1.0, 2.0, 5.0)  # sqrt(6) long a unit
    result, clipped = clip_updates(START, given, 2 * math.sqrt(6))
    assert clipped == [2]
    assert result[0] is given[0] and result[1] is given[1]
    torch.testing.assert_close(result[2], lambdas(3.0)[0])


def test_the_automatic_bound_follows_the_median_of_those_that_moved() -> None:
    values = [1.0, 1.0, 1.0, 1.0, 1.1, 1.1, 1.2, 1e5]  # four did not move
    result, clipped = clip_updates(START, lambdas(*values), "auto")
    assert clipped == [7]
    torch.testing.assert_close(result[7]["a"][0], torch.tensor(1 + 0.1 * CLIP_RATIO), rtol=1e-5, atol=0)
    assert clip_updates(START, lambdas(1.0, 1.1, 1e5), "auto")[1] == []  # of two, a median says nothing
    assert clip_updates(START, lambdas(*values), None)[1] == []


@pytest.mark.parametrize(
    ("weights", "share", "expected"),
    [
        ([1, 2, 3], 0.75, [1, 2, 3]),
        ([1, 2, 3], 1.0, [1, 2, 3]),
        ([1, 1, 10**15], 0.5, [1, 1, 2]),
        ([10**9, 1, 1, 10**9], 0.4, [4, 1, 1, 4]),
        ([5, 10**15], 0.5, [1, 1]),
        ([7], 0.2, [1]),
        ([7], 1.0, [7]),
    ],
)
def test_no_weight_is_more_than_a_share_of_all(weights: list[float], share: float, expected: list[float]) -> None:
    bounded = bound_weights(weights, share)
    assert bounded == pytest.approx(expected)
    assert max(bounded) <= max(share, 1 / len(weights)) * sum(bounded) * (1 + 1e-9)


def test_bounds_hold_for_any_weights() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = (10 ** rng.uniform(0, 9, rng.integers(1, 12))).tolist()
        share = float(rng.uniform(0.05, 1))
        bounded = bound_weights(weights, share)
        assert max(bounded) <= max(share, 1 / len(weights)) * sum(bounded) * (1 + 1e-9)
        order = np.argsort(weights)
        assert (np.diff(np.array(bounded)[order]) >= 0).all()


def test_the_middle_of_numbers_is_weighted_or_trimmed() -> None:
    assert middle([1.0, 3.0], [3.0, 1.0], "mean") == 1.5
    values = [0.0, 1.0, 1.0, 2.0, 1e6]
    assert int(TRIMMED_SHARE * 5) == 1
    assert middle(values, [1.0] * 5, "trimmed_mean") == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("loss", "best", "ratio", "ruined"),
    [
        (3.0, 1.0, 3.0, False),
        (3.1, 1.0, 3.0, True),
        (math.inf, 1.0, 3.0, True),
        (math.nan, 1.0, 3.0, True),
        (math.inf, math.inf, 3.0, False),  # there is nothing to go back to
        (1e9, 1.0, None, False),
    ],
)
def test_a_round_is_ruined_far_above_the_best(loss: float, best: float, ratio: float | None, ruined: bool) -> None:
    assert is_ruined(loss, best, ratio) is ruined
