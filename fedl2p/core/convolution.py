"""Convolutions whose second derivatives are made of the kernels that their first derivatives are made of.

Convolution is bilinear, and so are its two derivatives; each of the three is differentiated into the other two.
PyTorch's own double backward takes convolutions with kernels as large as the images instead, and half as long again on
a CPU.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class _Geometry(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class _Convolve(torch.autograd.Function):
    """From inputs and weight to outputs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry = geometry
        stride, padding, dilation, groups = geometry
        return torch.convolution(inputs, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (inputs, weight), geometry = ctx.saved_tensors, ctx.geometry
        d_inputs = _ByInputs.apply(d_outputs, weight, inputs.shape, geometry) if ctx.needs_input_grad[0] else None
        d_weight = _ByWeight.apply(d_outputs, inputs, weight.shape, geometry) if ctx.needs_input_grad[1] else None
        return d_inputs, d_weight, None


class _ByInputs(torch.autograd.Function):
    """From the outputs' gradient and the weight to the inputs' gradient."""

    @staticmethod
    def forward(ctx: Any, d_outputs: Tensor, weight: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(d_outputs, weight)
        ctx.geometry = geometry
        return _kernel(d_outputs, _template(weight, shape), weight, geometry, 0)

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        (d_outputs, weight), geometry = ctx.saved_tensors, ctx.geometry
        by_outputs = _Convolve.apply(direction, weight, geometry) if ctx.needs_input_grad[0] else None
        by_weight = _ByWeight.apply(d_outputs, direction, weight.shape, geometry) if ctx.needs_input_grad[1] else None
        return by_outputs, by_weight, None, None


class _ByWeight(torch.autograd.Function):
    """From the outputs' gradient and the inputs to the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, d_outputs: Tensor, inputs: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(d_outputs, inputs)
        ctx.geometry = geometry
        return _kernel(d_outputs, inputs, _template(inputs, shape), geometry, 1)

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        (d_outputs, inputs), geometry = ctx.saved_tensors, ctx.geometry
        by_outputs = _Convolve.apply(inputs, direction, geometry) if ctx.needs_input_grad[0] else None
        by_inputs = _ByInputs.apply(d_outputs, direction, inputs.shape, geometry) if ctx.needs_input_grad[1] else None
        return by_outputs, by_inputs, None, None


def _template(other: Tensor, shape: torch.Size) -> Tensor:
    """Memory of `shape` that nobody reads: the kernels want to see a shape, and the order of dimensions in `other`."""
    last = other.dim() == 4 and other.is_contiguous(memory_format=torch.channels_last) and not other.is_contiguous()
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=other.dtype, device=other.device, memory_format=order)


def _kernel(d_outputs: Tensor, inputs: Tensor, weight: Tensor, geometry: _Geometry, index: int) -> Tensor:
    stride, padding, dilation, groups = geometry
    zeros, mask = [0] * len(stride), [index == 0, index == 1, False]
    found = torch.ops.aten.convolution_backward(
        d_outputs, inputs, weight, None, stride, padding, dilation, False, zeros, groups, mask
    )
    gradient: Tensor = found[index]
    return gradient


class TwiceDifferentiableConvolutions(TorchFunctionMode):
    """While it is entered, convolutions on a CPU are of this module; for `torch.autograd`, not under `torch.func`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Takes the place of `torch.conv1d`, `conv2d` and `conv3d`."""
        dimensions = _CONVOLUTIONS.get(func)
        if dimensions is None:
            return func(*args, **(kwargs or {}))
        return _convolution(func, dimensions, *args, **(kwargs or {}))


def _convolution(
    func: Any,
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    ordinary = input.dim() == dimensions + 2 and all(type(v) in (int, tuple, list) for v in (stride, padding, dilation))
    real = input.is_floating_point() and weight.is_floating_point() and not torch.is_autocast_enabled("cpu")
    if input.device.type != "cpu" or not ordinary or not real:
        outputs: Tensor = func(input, weight, bias, stride, padding, dilation, groups)
        return outputs

    def each(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dimensions if len(values) == 1 else values

    outputs = _Convolve.apply(input, weight, _Geometry(each(stride), each(padding), each(dilation), groups))
    return outputs if bias is None else outputs + bias.view(-1, *[1] * dimensions)
