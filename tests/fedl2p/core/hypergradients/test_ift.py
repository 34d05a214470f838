"""Implicit differentiation: against explicit Hessians, against the argmin, and the two forms against each other."""

from collections.abc import Callable

import pytest
import torch
from core_cases import Case, central_differences, close, conv_case, image_batches, make_case, randomize, seeded
from torch import Tensor, nn

from fedl2p.core.finetune import FineTuned, evaluation_loss
from fedl2p.core.functional import Batch, InnerState
from fedl2p.core.hypergradients import FOMAML, IFT
from fedl2p.core.hypergradients.base import ValidationGradient, last_step_gradient, validation_gradient
from fedl2p.core.settings import BatchNormMode
from fedl2p.errors import ConfigError


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def flat_loss(case: Case, state: InnerState, batch: Batch, *, training: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The training loss as a function of (theta as one vector, beta)."""
    shapes = {name: p.shape for name, p in state.parameters.items()}

    def loss(theta: Tensor, beta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        parameters = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        return case.model.loss(parameters, state.buffers, beta, batch, training=training)[0]

    return loss


def second_derivatives(case: Case, state: InnerState, *, training: bool) -> tuple[Tensor, Tensor]:
    """H (n, n) and d2 L_T / (d theta d beta) (n, B), by torch.autograd.functional."""
    loss = flat_loss(case, state, case.train[0], training=training)
    blocks = torch.autograd.functional.hessian(loss, (flat(state.parameters), case.beta))
    return blocks[0][0], blocks[0][1]


def validation_of(case: Case, state: InnerState) -> ValidationGradient:
    return validation_gradient(case.model, case.episode(), state, case.beta, BatchNormMode.running)


@pytest.mark.parametrize("terms", [0, 1, 4])
@pytest.mark.parametrize("form", ["paper", "corrected"])
def test_equals_the_formulas_with_an_explicit_hessian(form: str, terms: int) -> None:
    case = conv_case()
    tuned, psi = case.tune(history=1), 0.2
    hessian, mixed = second_derivatives(case, tuned.final, training=form == "corrected")
    validation = validation_of(case, tuned.final)
    v = flat(validation.parameters)
    step = torch.eye(len(v), dtype=torch.float64) - psi * hessian
    p = sum(torch.linalg.matrix_power(step, j) @ v for j in range(terms + 1))
    scale, sign = (1.0, 1.0) if form == "paper" else (psi, -1.0)
    gradient = last_step_gradient(case.model, case.episode(), tuned, case.beta)
    sizes = [g.numel() for g in gradient.values()]
    products = (hessian @ p * flat(gradient)).split(sizes)
    estimate = case.estimate(IFT(form=form, neumann_terms=terms, neumann_lr=psi), tuned=tuned)
    close(estimate.beta, validation.beta - scale * (p @ mixed), 1e-9)
    close(estimate.eta, sign * scale * torch.stack([part.sum() for part in products]), 1e-9)
    close(estimate.val_loss, case.val_loss(case.beta, case.eta), 1e-12)


def test_the_validation_gradient_equals_finite_differences_by_everything_it_names() -> None:
    case = conv_case()
    state = case.tune(history=1).final
    found = validation_of(case, state)
    for part, tensors in (("parameters", found.parameters), ("running", found.running)):
        holder = state.parameters if part == "parameters" else state.buffers
        for name, gradient in tensors.items():

            def loss(value: Tensor, name: str = name, part: str = part, holder: dict[str, Tensor] = holder) -> Tensor:
                changed = {**holder, name: value.view(holder[name].shape)}
                moved = state._replace(**{"parameters" if part == "parameters" else "buffers": changed})
                return evaluation_loss(case.model, moved, case.beta, case.val)

            close(gradient.reshape(-1), central_differences(loss, holder[name].reshape(-1)), 1e-6)
    assert set(found.running) == {f"bn{i}.running_{kind}" for i in (1, 2) for kind in ("mean", "var")}


class TwoHalves(nn.Module):
    """Two batch norms on halves of the inputs, then a linear model: convex in its parameters, beta moves the argmin."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(2, affine=False)
        self.bn2 = nn.BatchNorm1d(2, affine=False)
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(torch.cat([self.bn1(inputs[:, :2]), self.bn2(inputs[:, 2:])], 1))


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs[:, 0] - targets) ** 2).mean()


def regression(size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = 0.4 + 1.2 * torch.randn(size, 4, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)
    return inputs, inputs @ torch.tensor([1.0, -2.0, 0.5, 0.7], dtype=torch.float64) + noise + 1


def argmin(case: Case, state: InnerState, beta: Tensor) -> InnerState:
    """The exact minimum of the (quadratic) training loss over theta: one Newton step."""
    loss = flat_loss(case, state, case.train[0], training=True)
    theta = flat(state.parameters)
    gradient, hessian = (
        derivative(lambda t: loss(t, beta), theta)
        for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
    )
    theta = theta - torch.linalg.solve(hessian, gradient)
    return state._replace(parameters={"linear.weight": theta[:4].view(1, 4), "linear.bias": theta[4:]})


def argmin_case() -> tuple[Case, FineTuned]:
    case = make_case(seeded(TwoHalves), [regression(40, 1)], [regression(9, 2), regression(5, 3)], loss_fn=squared)
    final = argmin(case, case.tune().final, case.beta)
    return case, FineTuned(final, (case.start,), torch.zeros(1, dtype=torch.float64))


def test_corrected_beta_part_tends_to_the_implicit_gradient_of_the_argmin_as_q_grows() -> None:
    case, tuned = argmin_case()
    final = tuned.final
    expected = central_differences(
        lambda beta: evaluation_loss(case.model, argmin(case, final, beta), beta, case.val), case.beta
    )
    errors = []
    for terms in (3, 30, 300):
        estimate = case.estimate(IFT(form="corrected", neumann_terms=terms, neumann_lr=0.15), tuned=tuned)
        errors.append(float((estimate.beta - expected).abs().max()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    close(estimate.beta, expected, 1e-6)
    direct = validation_of(case, tuned.final).beta
    assert float((direct - expected).abs().max()) > 0.1 * float(expected.abs().max())


def test_corrected_eta_part_tends_to_that_of_fomaml_as_q_grows() -> None:
    case, tuned = argmin_case()
    estimate = case.estimate(IFT(form="corrected", neumann_terms=400, neumann_lr=0.15), tuned=tuned)
    expected = case.estimate(FOMAML(), tuned=tuned)
    assert float(expected.eta.abs().max()) > 1e-3
    close(estimate.eta, expected.eta, 1e-8)


def test_paper_eta_part_is_the_corrected_one_times_minus_one_over_psi_where_the_modes_agree() -> None:
    class NoNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(16, 3)
            self.fc2 = nn.Linear(3, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.fc2(torch.tanh(self.fc1(inputs.flatten(1))))

    case = make_case(seeded(NoNorm), image_batches(5, 4), image_batches(4, 2, seed=9))
    psi = 0.3
    paper, corrected = (case.estimate(IFT(form=f, neumann_lr=psi)) for f in ("paper", "corrected"))
    close(paper.eta, -corrected.eta / psi, 1e-12)
    assert float(paper.eta.abs().max()) > 1e-4
    assert paper.beta.shape == corrected.beta.shape == (0,)


def test_paper_indirect_beta_part_is_the_corrected_one_over_psi_where_the_modes_agree() -> None:
    """Running statistics equal to those of the loss batch (biased) make evaluation mode equal to training mode."""
    case, tuned = argmin_case()
    inputs = case.train[0][0]
    buffers = dict(tuned.final.buffers)
    for name, part in (("bn1", inputs[:, :2]), ("bn2", inputs[:, 2:])):
        buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"] = part.mean(0), part.var(0, correction=0)
    tuned, psi = tuned._replace(final=tuned.final._replace(buffers=buffers)), 0.15
    direct = validation_of(case, tuned.final).beta
    paper, corrected = (case.estimate(IFT(form=f, neumann_lr=psi), tuned=tuned) for f in ("paper", "corrected"))
    close(paper.beta - direct, (corrected.beta - direct) / psi, 1e-9)
    close(paper.eta, -corrected.eta / psi, 1e-9)


@pytest.mark.parametrize("form", ["paper", "corrected"])
def test_without_steps_eta_has_no_influence(form: str) -> None:
    case = conv_case(steps=0)
    estimate = case.estimate(IFT(form=form))
    assert torch.equal(estimate.eta, torch.zeros(9, dtype=torch.float64))
    assert torch.isfinite(estimate.beta).all()
    close(estimate.val_loss, case.val_loss(case.beta, case.eta), 1e-12)


def test_only_the_last_state_is_asked_for() -> None:
    assert [IFT().history(n) for n in (0, 1, 7)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"form": "exact"}, "'exact'; allowed are 'paper' and 'corrected'"),
        ({"neumann_terms": -1}, "neumann_terms is -1"),
        ({"neumann_lr": 0.0}, "neumann_lr 0.0"),
        ({"neumann_lr": -0.1}, "neumann_lr -0.1"),
    ],
)
def test_settings_outside_their_range_are_errors(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        IFT(**settings)


def test_random_statistics_are_what_the_problems_start_from() -> None:
    layer = randomize(nn.BatchNorm2d(3))
    assert (layer.running_mean != 0).all()
    assert (layer.running_var != 1).all()
