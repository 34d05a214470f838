"""`unrolled` is what finite differences of the whole procedure give."""

import pytest
import torch
from core_cases import (
    Case,
    ConvNet,
    central_differences,
    close,
    conv_case,
    image_batches,
    make_case,
    named_inputs_case,
    seeded,
    unchanged,
)
from torch import Tensor, nn

from fedl2p.core.finetune import evaluation_loss, finetune, initial_running
from fedl2p.core.functional import FunctionalModel, LossFunction, expected_error
from fedl2p.core.hypergradients import ESTIMATORS, Unrolled
from fedl2p.core.settings import BatchNormMode, RunningStart
from fedl2p.errors import ConfigError


def assert_exact(case: Case, *, tolerance: float = 1e-7) -> None:
    estimate = case.estimate(Unrolled())
    close(estimate.beta, central_differences(lambda b: case.val_loss(b, case.eta), case.beta), tolerance)
    close(estimate.eta, central_differences(lambda e: case.val_loss(case.beta, e), case.eta), tolerance)
    close(estimate.val_loss, case.val_loss(case.beta, case.eta), 1e-12)


@pytest.mark.parametrize("momentum", [0.1, 0.8, None])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_equals_finite_differences_of_the_whole_procedure(momentum: float | None, steps: int) -> None:
    case = conv_case(momentum=momentum, steps=steps)
    assert (case.eta < 0).any()
    assert (case.eta == 0).any()
    assert (case.eta > 0).any()
    assert_exact(case)


def test_equals_finite_differences_with_betas_at_the_ends() -> None:
    case = conv_case()
    assert_exact(case._replace(beta=torch.tensor([0.0, 1.0], dtype=torch.float64)))


def test_equals_finite_differences_from_the_zero_one_start() -> None:
    case = conv_case(momentum=None)
    buffers = case.start.buffers | initial_running(
        case.model, case.start.buffers, case.statistics, start=RunningStart.zero_one
    )
    assert_exact(case._replace(start=case.start._replace(buffers=buffers)))


class Nets:
    class Flat(nn.Module):
        """A batch norm on features (N, C) and one module that stands in two places."""

        def __init__(self) -> None:
            super().__init__()
            self.flatten = nn.Flatten()
            self.bn1 = nn.BatchNorm1d(16)
            self.fc1 = nn.Linear(16, 4)
            self.bn2 = nn.BatchNorm1d(4, affine=False)
            self.same = self.bn2
            self.fc2 = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.tanh(self.bn2(self.fc1(self.bn1(self.flatten(inputs)))))
            return self.fc2(self.same(hidden))

    class Sequence(nn.Module):
        """A batch norm on sequences (N, C, L)."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 3, 2)
            self.bn = nn.BatchNorm1d(3)
            self.fc = nn.Linear(3, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.fc(torch.tanh(self.bn(self.conv(inputs.flatten(1, 2)))).mean(2))

    class Volume(nn.Module):
        """A batch norm on volumes (N, C, D, H, W)."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 2)
            self.bn = nn.BatchNorm3d(2, momentum=None)
            self.fc = nn.Linear(2, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.fc(torch.sigmoid(self.bn(self.conv(inputs.view(-1, 1, 2, 2, 4)))).mean((2, 3, 4)))

    class NoNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(16, 4)
            self.fc2 = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.fc2(torch.tanh(self.fc1(inputs.flatten(1))))


@pytest.mark.parametrize("net", [Nets.Flat, Nets.Sequence, Nets.Volume, Nets.NoNorm])
def test_equals_finite_differences_for_other_kinds_of_networks(net: type[nn.Module]) -> None:
    case = make_case(seeded(net), image_batches(6, 5, 7), image_batches(4, 3, seed=9), rate=0.1)
    assert_exact(case)


def test_equals_finite_differences_with_the_users_own_loss() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - nn.functional.one_hot(targets, 3)) ** 2).sum(1).mean()

    assert_exact(make_case(seeded(ConvNet), image_batches(5, 4), image_batches(4, 2, seed=9), loss_fn=loss_fn))


@pytest.mark.parametrize("by_name", [True, False])
def test_equals_finite_differences_with_a_dict_or_a_tuple_of_inputs(by_name: bool) -> None:
    assert_exact(named_inputs_case(by_name=by_name))


def test_a_batch_of_one_image_is_enough_for_convolutions() -> None:
    assert_exact(make_case(seeded(ConvNet), image_batches(1, 1), image_batches(1, seed=9)))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("steps", [1, 2])
def test_fewer_steps_equal_finite_differences_of_the_last_steps_from_the_stored_state(
    momentum: float | None, steps: int
) -> None:
    case = conv_case(momentum=momentum, steps=4)
    estimator = Unrolled(steps=steps)
    assert estimator.history(4) == steps
    tuned = case.tune(history=steps)
    start = tuned.history[0]
    estimate = case.estimate(estimator, tuned=tuned)
    by_beta = central_differences(lambda b: case.val_loss(b, case.eta, start=start, steps=steps), case.beta)
    by_eta = central_differences(lambda e: case.val_loss(case.beta, e, start=start, steps=steps), case.eta)
    close(estimate.beta, by_beta, 1e-7)
    close(estimate.eta, by_eta, 1e-7)
    whole = case.estimate(Unrolled())
    assert not torch.allclose(estimate.beta, whole.beta, rtol=1e-3)


def test_more_steps_than_there_are_equal_all() -> None:
    case = conv_case()
    many = Unrolled(steps=50)
    assert many.history(3) == Unrolled().history(3) == 3
    for a, b in zip(case.estimate(many), case.estimate(Unrolled()), strict=True):
        assert torch.equal(a, b)


def test_without_steps_only_the_direct_part_remains() -> None:
    case = conv_case(steps=0)
    estimate = case.estimate(Unrolled())
    close(estimate.beta, central_differences(lambda b: case.val_loss(b, case.eta), case.beta), 1e-7)
    assert torch.equal(estimate.eta, torch.zeros(9, dtype=torch.float64))


def test_a_small_step_against_it_lowers_the_loss_and_one_along_it_raises_it() -> None:
    case = conv_case()
    estimate = case.estimate(Unrolled())
    for part in ("beta", "eta"):
        gradient = getattr(estimate, part)
        size = 1e-4 / float(gradient.norm())
        for sign in (-1, 1):
            moved = case._replace(**{part: getattr(case, part) + sign * size * gradient})
            change = float(moved.val_loss(moved.beta, moved.eta) - estimate.val_loss)
            assert change == pytest.approx(sign * size * float(gradient.square().sum()), rel=1e-2)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_estimators_change_nothing_keep_no_graph_and_are_deterministic(name: str) -> None:
    case = conv_case()
    tuned = case.tune(history=3)
    held = (tuned, case.episode(), case.beta, case.eta)
    with unchanged(held, case.model.module.state_dict()):
        first, second = (case.estimate(ESTIMATORS[name](), tuned=tuned) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert first.beta.shape == case.beta.shape
    assert first.eta.shape == case.eta.shape
    assert first.val_loss.shape == ()


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_estimators_split_validation_data_into_batches_without_a_difference(name: str) -> None:
    case = conv_case()
    whole = case._replace(val=[(torch.cat([x for x, _ in case.val]), torch.cat([y for _, y in case.val]))])
    for a, b in zip(*(either.estimate(ESTIMATORS[name]()) for either in (case, whole)), strict=True):
        close(a, b, 1e-11)


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_an_error(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"{steps}; allowed are 1 or more"):
        Unrolled(steps=steps)


@pytest.mark.parametrize("val_loss_fn", [None, expected_error])
def test_equals_finite_differences_of_evaluation_by_batch_statistics(val_loss_fn: LossFunction | None) -> None:
    case = conv_case()
    model = FunctionalModel.of(case.model.module, val_loss_fn=val_loss_fn)

    def val_loss(beta: Tensor, eta: Tensor) -> Tensor:
        final = finetune(model, case.start, case.train, beta, eta).final
        return evaluation_loss(model, final, beta, case.val, bn_mode=BatchNormMode.batch)

    estimate = case._replace(model=model).estimate(Unrolled(), bn_mode=BatchNormMode.batch)
    close(estimate.beta, central_differences(lambda b: val_loss(b, case.eta), case.beta), 1e-7)
    close(estimate.eta, central_differences(lambda e: val_loss(case.beta, e), case.eta), 1e-7)
    assert not torch.allclose(estimate.val_loss, case.val_loss(case.beta, case.eta))
