"""FOMAML+: the last inner step with its gradient held constant."""

import pytest
import torch
from core_cases import Case, central_differences, close, conv_case
from torch import Tensor

from fedl2p.core.finetune import evaluation_loss
from fedl2p.core.functional import InnerState
from fedl2p.core.hypergradients import FOMAML
from fedl2p.core.hypergradients.base import last_step_gradient


def last_gradient(case: Case) -> dict[str, Tensor]:
    """The gradient of the last inner step by plain autograd."""
    before, batch = case.tune(history=1).history[-1], case.train[-1]
    leaves = {name: p.clone().requires_grad_() for name, p in before.parameters.items()}
    loss, _ = case.model.loss(leaves, before.buffers, case.beta, batch, training=True)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_eta_part_equals_finite_differences_of_the_last_step_with_its_gradient_constant(momentum: float | None) -> None:
    case = conv_case(momentum=momentum)
    tuned = case.tune(history=1)
    before, gradient = tuned.history[-1], last_gradient(case)

    def last_step(eta: Tensor) -> Tensor:
        parameters = {n: p - eta[i] * gradient[n] for i, (n, p) in enumerate(before.parameters.items())}
        return evaluation_loss(case.model, InnerState(parameters, tuned.final.buffers), case.beta, case.val)

    close(case.estimate(FOMAML(), tuned=tuned).eta, central_differences(last_step, case.eta), 1e-7)


def test_beta_part_equals_finite_differences_of_the_validation_loss_at_the_fine_tuned_state() -> None:
    case = conv_case()
    tuned = case.tune(history=1)
    expected = central_differences(lambda beta: evaluation_loss(case.model, tuned.final, beta, case.val), case.beta)
    close(case.estimate(FOMAML(), tuned=tuned).beta, expected, 1e-7)


def test_last_step_gradient_is_that_of_autograd_and_moved_the_parameters() -> None:
    case = conv_case()
    tuned = case.tune(history=1)
    gradient = last_step_gradient(case.model, case.episode(), tuned, case.beta)
    for index, (name, value) in enumerate(last_gradient(case).items()):
        close(gradient[name], value, 1e-11)
        moved = tuned.history[-1].parameters[name] - case.eta[index] * value
        close(tuned.final.parameters[name], moved, 1e-11)


def test_only_the_last_state_is_asked_for() -> None:
    assert [FOMAML().history(n) for n in (0, 1, 7)] == [0, 1, 1]


def test_without_steps_only_the_direct_part_remains() -> None:
    case = conv_case(steps=0)
    estimate = case.estimate(FOMAML())
    close(estimate.beta, central_differences(lambda b: case.val_loss(b, case.eta), case.beta), 1e-7)
    assert torch.equal(estimate.eta, torch.zeros(9, dtype=torch.float64))


def test_val_loss_is_the_mean_over_ragged_batches() -> None:
    case = conv_case()
    tuned = case.tune(history=1)
    close(case.estimate(FOMAML(), tuned=tuned).val_loss, case.val_loss(case.beta, case.eta), 1e-12)
