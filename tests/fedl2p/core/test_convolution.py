"""Convolutions with fast second derivatives: the outputs and derivatives of torch's own, of any geometry."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fedl2p.core import convolution
from fedl2p.core.convolution import TwiceDifferentiableConvolutions

GEOMETRIES: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "plain": (nn.Conv2d, (2, 4, 5, 6), {"kernel_size": 3}),
    "strided, padded": (nn.Conv2d, (2, 4, 7, 6), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "uneven": (nn.Conv2d, (2, 4, 7, 6), {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 1)}),
    "dilated": (nn.Conv2d, (2, 4, 7, 7), {"kernel_size": 2, "dilation": 3}),
    "grouped": (nn.Conv2d, (2, 4, 5, 5), {"kernel_size": 3, "groups": 2}),
    "depthwise": (nn.Conv2d, (2, 4, 5, 5), {"kernel_size": 3, "groups": 4, "padding": 1}),
    "pointwise, no bias": (nn.Conv2d, (2, 4, 3, 3), {"kernel_size": 1, "bias": False}),
    "padding same": (nn.Conv2d, (2, 4, 4, 4), {"kernel_size": 3, "padding": "same"}),
    "circular": (nn.Conv2d, (2, 4, 4, 4), {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "without a batch": (nn.Conv2d, (4, 5, 5), {"kernel_size": 3}),
    "1d": (nn.Conv1d, (2, 4, 7), {"kernel_size": 3, "stride": 2}),
    "3d": (nn.Conv3d, (1, 4, 3, 4, 3), {"kernel_size": 2, "padding": 1}),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    kind, shape, options = GEOMETRIES[name]
    torch.manual_seed(0)
    return kind(4, 4, **options).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)


FLAT = [name for name in GEOMETRIES if len(GEOMETRIES[name][1]) == 4]


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [
        *((name, torch.preserve_format) for name in GEOMETRIES),
        *((name, torch.channels_last) for name in FLAT),
    ],
)
def test_outputs_and_both_derivatives_are_torch_s(name: str, memory_format: torch.memory_format) -> None:
    layer, inputs = make(name)
    layer = layer.to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs = inputs.detach().clone(memory_format=memory_format).requires_grad_()
    leaves = [inputs, *layer.parameters()]
    results = []
    for ours in (False, True):
        if ours:
            with TwiceDifferentiableConvolutions():
                outputs = layer(inputs)
        else:
            outputs = layer(inputs)
        first = torch.autograd.grad(outputs.pow(3).sum(), leaves, create_graph=True)
        directions = [torch.cos(g.detach()) for g in first]
        second = torch.autograd.grad(first, leaves, directions, allow_unused=True, materialize_grads=True)
        results.append([outputs, *first, *second])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["strided, padded", "depthwise", "1d"])
def test_finite_differences(name: str) -> None:
    layer, inputs = make(name)
    names = [n for n, _ in layer.named_parameters()]

    def run(inputs: Tensor, *parameters: Tensor) -> Tensor:
        with TwiceDifferentiableConvolutions():
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), inputs)

    leaves = (inputs, *layer.parameters())
    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


def test_what_these_kernels_do_not_take_is_left_to_torch() -> None:
    layer, inputs = make("plain")
    half = layer.to(torch.float32)
    with TwiceDifferentiableConvolutions():
        strided = nn.functional.conv2d(inputs, layer.double().weight, stride=np.int64(2))
        imaginary = nn.functional.conv2d(inputs.to(torch.complex128), layer.weight.to(torch.complex128))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = half.float()(inputs.float())
    assert {type(t.grad_fn).__name__ for t in (strided, imaginary, low)}.isdisjoint({"_ConvolveBackward"})
    assert low.dtype == torch.bfloat16


def test_only_what_is_asked_for_is_computed_and_torch_s_own_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = make("plain")
    layer.requires_grad_(False)
    computed: list[int] = []
    kernel = convolution._kernel

    def watched(*arguments: Any) -> Tensor:
        computed.append(arguments[-1])
        return kernel(*arguments)

    monkeypatch.setattr(convolution, "_kernel", watched)
    with TwiceDifferentiableConvolutions():
        outputs = nn.functional.conv2d(inputs, layer.weight, stride=1)  # keywords and no bias
    assert type(outputs.grad_fn).__name__ == "_ConvolveBackward"
    torch.autograd.grad(outputs.pow(2).sum(), inputs)
    assert computed == [0]  # the inputs' gradient, not the weight's
    assert type(layer(inputs).grad_fn).__name__ == "ConvolutionBackward0"
