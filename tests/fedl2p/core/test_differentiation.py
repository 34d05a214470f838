"""Derivatives by `torch.autograd` and by `torch.func`: the same numbers, and nothing is left behind."""

import warnings
from collections.abc import Callable
from typing import Any

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

from fedl2p.core.differentiation import FUNC_TRANSFORMS, Autograd, CompiledSteps, Differentiation
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
    "inputs of several tensors": named_inputs_case,
    "no steps": lambda: conv_case(steps=0),
}
ESTIMATORS: dict[str, HypergradientEstimator] = {
    "ift, paper": IFT(form="paper"),
    "ift, corrected": IFT(form="corrected", neumann_terms=1),
    "fomaml": FOMAML(),
    "unrolled": Unrolled(),
    "unrolled, last step": Unrolled(steps=1),
}


WAYS = {"torch.func": FUNC_TRANSFORMS, "torch.autograd": Autograd()}


def by_autograd(case: Case) -> Case:
    return case._replace(differentiation=Autograd())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hypergradients_by_autograd_are_those_by_transforms(name: str, estimator: str) -> None:
    case, method = CASES[name](), ESTIMATORS[estimator]
    tuned = case.tune(method.history(len(case.train)))
    expected = case.estimate(method, tuned=tuned)
    with unchanged(*tuned.final, case.beta, case.eta):
        actual = by_autograd(case).estimate(method, tuned=tuned)
    for one, other in zip(actual, expected, strict=True):
        close(one, other, 1e-10)
        assert not one.requires_grad


@pytest.mark.parametrize("make", [CASES["convolutions"], CASES["layers of many kinds"]])
def test_unrolled_by_autograd_equals_finite_differences_of_the_whole_procedure(make: Callable[[], Case]) -> None:
    case = by_autograd(make())
    found = case.estimate(Unrolled())
    close(found.beta, central_differences(lambda beta: case.val_loss(beta, case.eta), case.beta), 1e-6)
    close(found.eta, central_differences(lambda eta: case.val_loss(case.beta, eta), case.eta), 1e-6)


def test_a_loss_whose_gradient_is_constant_has_no_second_derivatives() -> None:
    case = make_case(
        seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3))),
        image_batches(4),
        image_batches(6),
        loss_fn=lambda outputs, targets: outputs.sum(),
    )
    expected = case.estimate(Unrolled())
    close(by_autograd(case).estimate(Unrolled(), tuned=case.tune(1)).eta, expected.eta, 1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tensors_of_inference_mode_are_taken_as_they_are(estimator: str) -> None:
    case, method = by_autograd(conv_case()), ESTIMATORS[estimator]
    expected = case.estimate(method)
    with torch.inference_mode():
        inside = case.estimate(method)
        data = conv_case()
    outside = case._replace(train=data.train, beta=data.beta).estimate(method)
    for found in (inside, outside):
        close(found.eta, expected.eta, 1e-10)


class Checkpointed(ConvNet):
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(self.conv1, inputs, use_reentrant=False)
        return self.fc(self.bn2(self.conv2(torch.tanh(self.bn1(hidden)))).mean((2, 3)))


@pytest.mark.parametrize("way", WAYS)
def test_checkpointed_activations_are_refused_not_computed_again_at_other_tensors(way: str) -> None:
    case = conv_case()
    inputs = case.train[0][0].requires_grad_()
    made = make_case(seeded(Checkpointed), [(inputs, case.train[0][1])], case.val)
    checkpointed = made._replace(differentiation=WAYS[way])
    with pytest.raises(RuntimeError, match=r"switch it off|saved tensor hooks"):
        checkpointed.tune()
    tuned = case.tune(history=1)
    with pytest.raises(RuntimeError, match=r"switch it off|saved tensor hooks"):
        case._replace(model=checkpointed.model, differentiation=WAYS[way]).estimate(IFT(), tuned=tuned)


def test_dropout_is_drawn_by_autograd_too() -> None:
    case = by_autograd(make_case(seeded(lambda: ConvNet(dropout=0.5)), image_batches(4, 5), image_batches(6)))
    assert torch.isfinite(case.estimate(Unrolled()).eta).all()


# Compiled steps


def test_a_compiled_step_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile(function: Any, **options: Any) -> Any:
        compiled.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    case = conv_case()
    expected = case.tune().final
    found = case._replace(differentiation=CompiledSteps()).tune().final
    ((function, options),) = compiled
    assert function.__func__ is Differentiation.inner_step and options == {"dynamic": False}
    assert all(torch.equal(found.parameters[name], p) for name, p in expected.parameters.items())


def test_without_a_compiler_steps_go_on_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def broken(*arguments: Any) -> Any:
        calls.append(1)
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    case = conv_case()
    steps = CompiledSteps()
    with pytest.warns(UserWarning, match=r"cannot compile .*: No working C\+\+ compiler found$"):
        found = case._replace(differentiation=steps).tune().final
    assert len(calls) == 1
    assert all(torch.equal(found.parameters[name], p) for name, p in case.tune().final.parameters.items())


def test_an_error_of_the_step_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = conv_case()
    bad = [(case.train[0][0][:, :, :1], case.train[0][1])]  # images too small for the second convolution
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        case._replace(train=bad, differentiation=CompiledSteps()).tune()


@pytest.mark.slow
def test_torch_compiles_the_step() -> None:
    case = conv_case()
    steps = CompiledSteps()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, at its first compilation
        found = case._replace(differentiation=steps).tune().final
    assert getattr(steps._step, "__func__", None) is not Differentiation.inner_step
    for name, p in case.tune().final.parameters.items():
        torch.testing.assert_close(found.parameters[name], p, rtol=0, atol=1e-10)
