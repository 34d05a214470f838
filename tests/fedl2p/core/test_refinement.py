"""Refinement: its gradient, that it never makes validation worse, its bounds, and cohorts."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from core_cases import Case, central_differences, close, conv_case, unchanged
from torch import Tensor
from torch.utils import _pytree as pytree

from fedl2p.core.cohort import stack, take
from fedl2p.core.differentiation import Autograd
from fedl2p.core.finetune import active_parameters
from fedl2p.core.functional import InnerState
from fedl2p.core.hypergradients import FOMAML, HypergradientEstimator, Unrolled
from fedl2p.core.learner import Learner
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.refinement import Refined, refine
from fedl2p.core.settings import BatchNormMode, LearnerSettings, RefinementSettings
from fedl2p.errors import ConfigError, DataError

FREE = {"longest_step": 1e9, "farthest": 1e9}


def refined(
    case: Case,
    settings: RefinementSettings,
    *,
    eta: Tensor | None = None,
    estimator: HypergradientEstimator | None = None,
) -> Refined:
    recipe = Hyperparameters(case.beta, case.eta if eta is None else eta)
    origin = InnerState(*case.model.tensors())
    return refine(case.model, estimator or Unrolled(), origin, case.episode(), recipe, settings)


def by_log_eta(case: Case) -> Callable[[Tensor], Tensor]:
    return lambda log_factor: case.val_loss(case.beta, case.eta * log_factor.exp())


def test_a_step_goes_against_the_finite_difference_of_the_validation_loss_by_log_eta() -> None:
    case = conv_case()
    done = refined(case, RefinementSettings(steps=1, step_size=1e-3, **FREE))
    slope = central_differences(by_log_eta(case), torch.zeros_like(case.eta))
    assert float(slope.abs().max()) > 1e-3
    assert done.accepted.tolist() == [True]
    close(done.hyperparameters.eta, case.eta * (-1e-3 * slope).exp(), 1e-9)
    assert torch.equal(done.hyperparameters.beta, case.beta)


@pytest.mark.parametrize("estimator", [Unrolled(), FOMAML()])
@pytest.mark.parametrize("step_size", [0.5, 4.0, 1000.0])
def test_the_refined_recipe_has_the_lowest_validation_loss_of_all_that_were_tried(
    estimator: HypergradientEstimator, step_size: float
) -> None:
    case = conv_case()
    done = refined(case, RefinementSettings(steps=5, step_size=step_size, **FREE), estimator=estimator)
    close(done.val_losses[0], case.val_loss(case.beta, case.eta), 1e-12)
    close(case.val_loss(*done.hyperparameters), done.val_losses.min(), 1e-12)
    lowest = torch.cummin(done.val_losses, 0).values
    assert done.accepted.tolist() == (done.val_losses[1:] < lowest[:-1]).tolist()


def test_a_step_that_raises_the_loss_is_undone_and_shortened_to_a_quarter() -> None:
    case = conv_case()
    slope = central_differences(by_log_eta(case), torch.zeros_like(case.eta))
    size = 1.0
    while by_log_eta(case)(-size * slope) < case.val_loss(case.beta, case.eta):
        size *= 2
    done = refined(case, RefinementSettings(steps=2, step_size=size, **FREE))
    assert not done.accepted[0]
    close(done.val_losses[2], by_log_eta(case)(-0.25 * size * slope), 1e-6)


def test_rates_stay_within_their_bounds_and_keep_signs_and_zeros() -> None:
    case = conv_case()
    one = refined(case, RefinementSettings(steps=1, step_size=1e6, longest_step=0.05, farthest=1.0))
    assert one.accepted.tolist() == [True]
    moves = (one.hyperparameters.eta / case.eta).log()[case.eta != 0]
    close(moves.abs(), torch.full_like(moves, 0.05), 1e-9)
    many = refined(case, RefinementSettings(steps=6, step_size=1e6, longest_step=0.05, farthest=0.12))
    assert float((many.hyperparameters.eta / case.eta).log()[case.eta != 0].abs().max()) <= 0.12 + 1e-12
    assert torch.equal(many.hyperparameters.eta.sign(), case.eta.sign())


def test_a_recipe_that_diverges_is_slowed_down_until_it_does_not() -> None:
    case = conv_case(steps=5)
    wild = case.eta.abs() * 1e300
    assert not torch.isfinite(case.val_loss(case.beta, wild))
    done = refined(case, RefinementSettings(steps=3, longest_step=800.0, farthest=2000.0), eta=wild)
    assert torch.isinf(done.val_losses[0]) and torch.isfinite(done.val_losses[-1])
    assert torch.isfinite(case.val_loss(*done.hyperparameters))


def test_without_steps_the_recipe_is_as_given() -> None:
    case = conv_case()
    done = refined(case, RefinementSettings(steps=0))
    assert torch.equal(done.hyperparameters.eta, case.eta) and len(done.val_losses) == 1 and len(done.accepted) == 0


def test_a_cohort_answers_what_its_clients_answer_alone() -> None:
    case = conv_case()
    etas = [scale * case.eta for scale in (0.5, 1.0, 200.0)]
    settings = RefinementSettings(steps=4, step_size=300.0)
    episodes = [case.episode()] * 3
    recipes = [Hyperparameters(case.beta, eta) for eta in etas]
    origin = InnerState(*case.model.tensors())
    run = partial(refine, case.model, Unrolled(), origin, settings=settings)
    together = torch.vmap(run, randomness="different")(stack(episodes), stack(recipes))
    for row, (episode, recipe) in enumerate(zip(episodes, recipes, strict=True)):
        active = active_parameters(case.model, recipe.eta)
        alone = run(episode, recipe, active=active, differentiation=Autograd())
        for mine, other in zip(take(together, row), alone, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert len({tuple(row) for row in together.accepted.tolist()}) > 1, "clients go their own ways"


def learner(case: Case) -> Learner:
    settings = LearnerSettings(evaluation_statistics=BatchNormMode.batch)
    return Learner(case.model, MetaNets(case.model.module).double(), settings=settings)


def test_a_learner_refines_clients_of_all_shapes_in_order_with_its_own_statistics() -> None:
    cases = [conv_case(seed=seed, steps=steps) for seed, steps in ((0, 3), (1, 2), (2, 3))]
    settings = RefinementSettings(steps=2, step_size=30.0)
    recipes = [Hyperparameters(case.beta, case.eta) for case in cases]
    mine = learner(cases[0])
    episodes = [case.episode() for case in cases]
    for max_cohort in (None, 1):
        found = mine.refine(episodes, recipes, settings, max_cohort=max_cohort)
        for episode, recipe, done in zip(episodes, recipes, found, strict=True):
            alone = refine(
                mine.model, mine.estimator, mine.origin, episode, recipe, settings, bn_mode=BatchNormMode.batch
            )
            for one, other in zip(pytree.tree_leaves(done), pytree.tree_leaves(alone), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_learner_names_what_is_missing() -> None:
    case = conv_case()
    recipe = Hyperparameters(case.beta, case.eta)
    with pytest.raises(DataError, match="no val data"):
        learner(case).refine([case.episode()._replace(val_batches=[])], [recipe], RefinementSettings())


def test_nothing_that_the_caller_holds_is_changed_and_no_graph_is_kept() -> None:
    case = conv_case()
    episode, origin = case.episode(), InnerState(*case.model.tensors())
    with unchanged(episode, origin, case.beta, case.eta, case.model.module.state_dict()):
        done = refine(
            case.model, Unrolled(), origin, episode, Hyperparameters(case.beta, case.eta), RefinementSettings()
        )
    assert not done.hyperparameters.eta.requires_grad and not done.val_losses.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps is -1; allowed is a whole number, 0 or more"),
        ({"steps": True}, "steps is True"),
        ({"step_size": 0.0}, "step_size is 0.0; allowed is above 0"),
        ({"longest_step": float("nan")}, "longest_step is nan"),
        ({"farthest": float("inf")}, "farthest is inf"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RefinementSettings(**settings)  # type: ignore[arg-type]  # wrong on purpose
