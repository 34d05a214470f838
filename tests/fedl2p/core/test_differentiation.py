"""A client that goes alone has its derivatives from `torch.autograd`: the same numbers, and nothing is left behind."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from core_cases import Case, ConvNet, central_differences, close, conv_case, image_batches, make_case, seeded, unchanged
from torch import Tensor, nn

from fedl2p.core.hypergradients import FOMAML, IFT, HypergradientEstimator, Unrolled


class Dense(nn.Module):
    """Written in place, added in place, concatenated, one norm in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        first = self.norm(self.first(inputs)).tanh_()
        second = self.norm(self.second(first))
        second += first
        return self.head(torch.cat([first, second.sigmoid_()], 1).mean((2, 3)))


class Mixed(nn.Module):
    """Strided, grouped and pointwise convolutions, a norm without affine parameters, and one unused tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.bare = nn.BatchNorm2d(4, affine=False, momentum=None)
        self.third = nn.Conv2d(4, 3, 1, bias=False)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(inputs)))
        hidden = torch.nn.functional.softplus(self.bare(self.second(hidden)))
        return self.third(hidden).mean((2, 3))


CASES: dict[str, Callable[[], Case]] = {
    "convolutions": lambda: conv_case(steps=3),
    "a cumulative average": lambda: conv_case(momentum=None, steps=2),
    "momentum 0": lambda: conv_case(momentum=0.0, steps=2),
    "layers of many kinds": lambda: make_case(seeded(Mixed), image_batches(4, 5), image_batches(6, 3)),
    "in place and in two places": lambda: make_case(seeded(Dense), image_batches(4, 5), image_batches(6, 3)),
    "no batch norm": lambda: make_case(
        seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))),
        image_batches(4, 5),
        image_batches(6),
    ),
    "no steps": lambda: conv_case(steps=0),
}
ESTIMATORS: dict[str, HypergradientEstimator] = {
    "ift, paper": IFT(form="paper"),
    "ift, corrected": IFT(form="corrected", neumann_terms=1),
    "fomaml": FOMAML(),
    "unrolled": Unrolled(),
    "unrolled, last step": Unrolled(steps=1),
}


def alone(case: Case) -> Case:
    return case._replace(model=replace(case.model, alone=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hypergradients_of_a_client_alone_are_those_of_a_cohort(name: str, estimator: str) -> None:
    case, method = CASES[name](), ESTIMATORS[estimator]
    problem = case.problem(method.history(len(case.train)))
    expected = method(case.model, problem)
    with unchanged(*problem.tuned.final, problem.beta, problem.eta):
        actual = method(alone(case).model, problem)
    for one, other in zip(actual, expected, strict=True):
        close(one, other, 1e-10)
        assert not one.requires_grad


@pytest.mark.parametrize("make", [CASES["convolutions"], CASES["layers of many kinds"]])
def test_unrolled_alone_equals_finite_differences_of_the_whole_procedure(make: Callable[[], Case]) -> None:
    case = alone(make())
    found = Unrolled()(case.model, case.problem())
    close(found.beta, central_differences(lambda beta: case.val_loss(beta, case.eta), case.beta), 1e-6)
    close(found.eta, central_differences(lambda eta: case.val_loss(case.beta, eta), case.eta), 1e-6)


def test_a_loss_whose_gradient_is_constant_has_no_second_derivatives() -> None:
    case = make_case(
        seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3))),
        image_batches(4),
        image_batches(6),
        loss_fn=lambda outputs, targets: outputs.sum(),
    )
    expected = Unrolled()(case.model, case.problem())
    close(Unrolled()(alone(case).model, case.problem()).eta, expected.eta, 1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tensors_of_inference_mode_are_taken_as_they_are(estimator: str) -> None:
    case, method = alone(conv_case()), ESTIMATORS[estimator]
    expected = method(case.model, case.problem(method.history(3)))
    with torch.inference_mode():
        inside = method(case.model, case.problem(method.history(3)))
        data = conv_case()
    outside = method(case.model, case._replace(train=data.train, beta=data.beta).problem(method.history(3)))
    for found in (inside, outside):
        close(found.eta, expected.eta, 1e-10)


class Checkpointed(ConvNet):
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(self.conv1, inputs, use_reentrant=False)
        return self.fc(self.bn2(self.conv2(torch.tanh(self.bn1(hidden)))).mean((2, 3)))


@pytest.mark.parametrize("is_alone", [False, True])
def test_checkpointed_activations_are_refused_not_computed_again_at_other_tensors(is_alone: bool) -> None:
    case = conv_case()
    inputs = case.train[0][0].requires_grad_()
    checkpointed = make_case(seeded(Checkpointed), [(inputs, case.train[0][1])], case.val)
    model = replace(checkpointed.model, alone=is_alone)
    with pytest.raises(RuntimeError, match=r"switch it off|saved tensor hooks"):
        checkpointed._replace(model=model).tune()
    problem = case._replace(model=model).problem
    with pytest.raises(RuntimeError, match=r"switch it off|saved tensor hooks"):
        IFT()(model, problem())


def test_dropout_is_drawn_for_a_client_alone_too() -> None:
    case = alone(make_case(seeded(lambda: ConvNet(dropout=0.5)), image_batches(4, 5), image_batches(6)))
    assert torch.isfinite(Unrolled()(case.model, case.problem()).eta).all()
