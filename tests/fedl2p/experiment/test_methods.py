"""Hand-made recipes, the search for their rates, and the shuffling of the ablation."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from core_cases import ConvNet, image_batches, seeded

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.functional import FunctionalModel
from fedl2p.core.statistics import collect_statistics
from fedl2p.errors import ConfigError, FederationError
from fedl2p.experiment.methods import (
    FINE_TUNING,
    MAX_RATES,
    FixedRecipe,
    TunedRate,
    derangement,
    given_rates,
    tune_rate,
)
from fedl2p.io import to_json


def bowl(best: float) -> Callable[[float], float]:
    """A loss that is lowest at `best`, on a logarithmic scale."""
    return lambda rate: abs(math.log(rate / best))


def test_a_best_rate_inside_the_grid_needs_no_more() -> None:
    assert tune_rate(bowl(0.1), [0.3, 0.1, 0.03]) == (0.1, {rate: bowl(0.1)(rate) for rate in (0.03, 0.1, 0.3)})


def test_the_grid_grows_upwards_until_the_best_is_inside() -> None:
    best, losses = tune_rate(bowl(80), [0.1, 1.0])
    assert best == pytest.approx(100)
    assert list(losses) == pytest.approx([0.1, 1, 10, 100, 1000])


def test_the_grid_grows_downwards_until_the_best_is_inside() -> None:
    best, losses = tune_rate(bowl(0.0012), [0.1, 1.0])
    assert best == pytest.approx(0.001)
    assert list(losses) == pytest.approx([0.0001, 0.001, 0.01, 0.1, 1])


def test_a_grid_with_uneven_steps_grows_by_the_step_at_its_end() -> None:
    _, losses = tune_rate(bowl(4), [0.1, 1.0, 2.0])
    assert list(losses) == pytest.approx([0.1, 1, 2, 4, 8])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_rate_that_diverges_counts_as_infinitely_bad(bad: float) -> None:
    best, losses = tune_rate(lambda rate: bad if rate > 0.5 else bowl(0.4)(rate), [0.01, 0.1, 1.0, 10.0])
    assert losses[1.0] == losses[10.0] == math.inf
    assert best == 0.1


def test_every_rate_is_measured_once() -> None:
    asked: list[float] = []

    def loss_of(rate: float) -> float:
        asked.append(rate)
        return bowl(0.001)(rate)

    tune_rate(loss_of, [1.0, 0.1, 1.0])
    assert len(asked) == len(set(asked))


def test_a_loss_that_is_flat_is_no_endless_search() -> None:
    best, losses = tune_rate(lambda rate: 1.0, [0.1, 1.0])
    assert best in losses


def test_where_every_rate_diverges_lower_ones_are_tried() -> None:
    best, losses = tune_rate(lambda rate: math.nan if rate > 0.02 else bowl(0.003)(rate), [0.1, 0.4])
    assert best == pytest.approx(0.1 / 4**3)
    assert [math.isinf(losses[rate]) for rate in sorted(losses)] == [False] * 3 + [True] * 3


def test_where_no_rate_helps_the_lowest_is_taken() -> None:
    best, losses = tune_rate(lambda rate: math.nan, [0.1, 1.0])
    assert best == min(losses) == pytest.approx(1e-23, rel=1e-3)
    assert set(losses.values()) == {math.inf}
    best, losses = tune_rate(math.log, [0.1, 1.0])
    assert best == min(losses)
    assert len(losses) == MAX_RATES


def test_a_loss_that_falls_upwards_forever_is_an_error_with_the_last_rate() -> None:
    with pytest.raises(FederationError, match=rf"still falls at the rate .* a grid of {MAX_RATES} rates"):
        tune_rate(lambda rate: -math.log(rate), [0.1, 1.0])


@pytest.mark.parametrize(
    "chosen",
    [
        TunedRate(0.1, 0.5, ((0.01, 0.7), (0.1, 0.5), (1.0, math.inf))),
        TunedRate(1e-9, math.inf, ((1e-9, math.inf), (1.0, math.inf)), helps=False),
    ],
)
def test_a_tuned_rate_comes_back_from_json(chosen: TunedRate) -> None:
    assert TunedRate.from_dict(json.loads(to_json(chosen.as_dict()))) == chosen
    assert ("note" in chosen.as_dict()) != chosen.helps


@pytest.mark.parametrize("rates", [{}, {"ft_bn_c": 0.1}, {"ft_bn_c": 1, "ft_bn_g": 1, "ft_bn_i": 1, "other": 1}])
def test_given_rates_are_one_for_each_method(rates: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"baselines\.tuned_rates is .* ft_bn_c, ft_bn_g, ft_bn_i"):
        given_rates(rates)


@pytest.mark.parametrize("rates", [[], [0.1], [0.1, 0.1], [0.0, 0.1], [-0.1, 0.1]])
def test_a_grid_of_fewer_than_two_positive_rates_is_refused(rates: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"baselines\.rates is .* two or more positive rates"):
        tune_rate(bowl(1), rates)


@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_a_derangement_moves_everybody_and_repeats(count: int) -> None:
    for seed in range(20):
        order = derangement(count, seed)
        assert sorted(order) == list(range(count))
        assert all(position != other for position, other in enumerate(order))
        assert order == derangement(count, seed)
    assert count < 4 or len({tuple(derangement(count, seed)) for seed in range(20)}) > 1


def test_a_derangement_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    derangement(9, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fixed_recipe_is_the_same_for_all_layers_and_clients() -> None:
    model = FunctionalModel.of(convert_batchnorm(seeded(ConvNet)))
    recipe = FixedRecipe.fitting(model, beta=0.25, rate=0.1)
    for seed in (1, 2):
        beta, eta = recipe(collect_statistics(model.module, image_batches(5, seed=seed)))
        assert beta.tolist() == [0.25] * 2
        assert eta.tolist() == [0.1] * len(model.parameter_names)
        assert beta.dtype == eta.dtype == torch.float64


def test_the_three_ways_to_fine_tune_are_the_paper_s() -> None:
    assert {name: (way.beta, way.bn_mode) for name, way in FINE_TUNING.items()} == {
        "ft_bn_c": (1.0, "running"),
        "ft_bn_g": (0.0, "running"),
        "ft_bn_i": (1.0, "batch"),
    }
