"""Batch norm that mixes pretrained and client statistics by beta (Eq. 1 and 2 of the FedL2P paper).

The layers are written in plain arithmetic, in few passes over the inputs. A forward pass in training mode replaces the
running statistics by new tensors instead of writing into the old ones. So `torch.func.functional_call` makes the layers
pure functions, and gradients, Jacobian-vector products of gradients and `torch.vmap` all pass through them. Where first
derivatives outside of those transforms are enough, as in the inner loop of a client that goes alone, PyTorch's kernels
do the same in half the passes.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fedl2p.core.distributed import Shards
from fedl2p.core.layer_replacements import replacement_of
from fedl2p.errors import ModelError


@dataclass(frozen=True)
class ForwardMode:
    """How a forward pass of a `MixedBatchNorm` is run; a `FunctionalModel` sets it for the time of a call.

    Attributes:
        differentiable_statistics: whether gradients flow into the new running statistics. Off in ordinary use, where
            the graphs of all steps would pile up.
        fused: whether nothing but the first derivatives by inputs, weight and bias will be asked for, and no transform
            of `torch.func` is at work, so that PyTorch's kernels may do training mode.
        shards: who shares the batches, while several processes do; statistics are then those of the whole batch.
    """

    differentiable_statistics: bool = False
    fused: bool = False
    shards: Shards | None = None


FUNCTIONAL = ForwardMode(differentiable_statistics=True)
FUSED = ForwardMode(differentiable_statistics=True, fused=True)


class _MixedInKernels(torch.autograd.Function):
    """Training mode in PyTorch's kernels: two passes over the inputs forward, three backward; once differentiable.

    From (inputs, weight, bias, beta, pretrained mean, pretrained variance, eps) to the outputs and the batch's mean and
    biased variance. Gradients reach inputs, weight and bias, from the outputs alone.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, weight, bias, beta, pretrained_mean, pretrained_var, eps = args
        # Running statistics that are thrown away; their type is that in which the kernel computes.
        scratch = torch.zeros_like(pretrained_mean), torch.ones_like(pretrained_var)
        batch_mean, batch_var = torch.batch_norm_update_stats(inputs, *scratch, 0.0)
        mean = torch.lerp(pretrained_mean, batch_mean, beta)
        var = torch.lerp(pretrained_var, batch_var, beta)
        outputs = torch.native_batch_norm(inputs, weight, bias, mean, var, False, 0.0, eps)[0]
        ctx.save_for_backward(inputs, weight, batch_mean, mean, var, beta)
        ctx.eps = eps
        ctx.mark_non_differentiable(batch_mean, batch_var)
        return outputs, batch_mean, batch_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, batch_mean, mean, var, beta = ctx.saved_tensors
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], inputs, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        if not ctx.needs_input_grad[0]:
            return None, d_weight, d_bias, None, None, None, None
        # The mixed mean moves by beta / n with an input, the mixed variance by beta * 2 (input - batch mean) / n.
        share = beta * inputs.shape[1] / inputs.numel()
        precision = 1 / (var + ctx.eps)
        scale = weight * precision.sqrt()
        slope = -share * precision * weight * d_weight
        offset = -share * scale * d_bias - slope * batch_mean
        scale, slope, offset = (f.to(inputs.dtype).view(_by_channel(inputs)) for f in (scale, slope, offset))
        d_inputs = torch.addcmul(offset, slope, inputs).addcmul_(scale, gradients[0])
        return d_inputs, d_weight, d_bias, None, None, None, None


def _by_channel(inputs: Tensor) -> tuple[int, ...]:
    """The shape in which a number a channel is spread over `inputs`."""
    return (1, -1) + (1,) * (inputs.dim() - 2)


class MixedBatchNorm(nn.Module):
    """A batch norm whose statistics are `(1 - beta) * pretrained + beta * client` (Eq. 2).

    In training mode the client's part is the batch mean and the biased batch variance, and the running statistics
    follow with `momentum` (and the unbiased variance). In evaluation mode the client's part is the running statistics.

    Attributes:
        weight: gamma, shape (J,), or None without affine parameters.
        bias: delta, shape (J,), or None without affine parameters.
        running_mean: the client's running mean, shape (J,).
        running_var: the client's running variance, shape (J,).
        pretrained_mean: the pretrained model's running mean, shape (J,).
        pretrained_var: the pretrained model's running variance, shape (J,).
        beta: 0-d, how far to trust the client's statistics; 0 is the pretrained model.
        num_batches_tracked: 0-d, kept only where `momentum` is None (a cumulative average).
        layer_name: the layer's name in its model, for error messages.
        activation: what timm's `BatchNormAct2d` does after normalizing; None for others.
        forward_mode: how forward passes are run.
    """

    dims: tuple[int, ...] = ()
    running_mean: Tensor
    running_var: Tensor
    pretrained_mean: Tensor
    pretrained_var: Tensor
    beta: Tensor
    num_batches_tracked: Tensor

    def __init__(self, source: _BatchNorm, *, layer_name: str = "") -> None:
        """Takes over a plain batch-norm layer: its parameters (copied), statistics, eps and momentum.

        Args:
            source: a `BatchNorm1d`, `2d` or `3d` with running statistics.
            layer_name: the layer's name in its model.
        """
        super().__init__()
        if source.running_mean is None or source.running_var is None:
            raise ModelError(
                f"Batch-norm layer '{layer_name}' keeps no running statistics, so there is nothing to mix the client's "
                "with; build the model with track_running_stats=True."
            )
        self.num_features = source.num_features
        self.eps = source.eps
        self.momentum = source.momentum
        self.layer_name = layer_name
        self.forward_mode = ForwardMode()
        self.weight = copy.deepcopy(source.weight)
        self.bias = copy.deepcopy(source.bias)
        self.register_buffer("running_mean", source.running_mean.detach().clone())
        self.register_buffer("running_var", source.running_var.detach().clone())
        self.register_buffer("pretrained_mean", source.running_mean.detach().clone())
        self.register_buffer("pretrained_var", source.running_var.detach().clone())
        self.register_buffer("beta", torch.zeros_like(source.running_mean[0]))
        if self.momentum is None:
            assert source.num_batches_tracked is not None
            self.register_buffer("num_batches_tracked", source.num_batches_tracked.detach().clone())
        self.activation: nn.Module | None = None
        if _is_timm_s(source):
            self.activation = nn.Sequential(*(copy.deepcopy(layer) for layer in source.children()))
        self.train(source.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalizes `inputs`.

        Args:
            inputs: shape (N, J, ...), of as many dimensions as the layer's kind takes.

        Returns:
            A tensor of the same shape.

        Raises:
            ModelError: the shape does not fit, or in training mode a channel has one value only.
        """
        if inputs.dim() not in self.dims or inputs.shape[1] != self.num_features:
            raise ModelError(
                f"Batch-norm layer '{self.layer_name}' takes (N, {self.num_features}, ...) with "
                f"{' or '.join(map(str, self.dims))} dimensions, but got the shape {tuple(inputs.shape)}."
            )
        if not inputs.is_floating_point():
            raise ModelError(
                f"Batch-norm layer '{self.layer_name}' takes floating-point inputs, but got {inputs.dtype}."
            )
        outputs = self._in_kernels(inputs) if self._kernels_fit(inputs) else self._in_arithmetic(inputs)
        return outputs if self.activation is None else self.activation(outputs)

    def _kernels_fit(self, inputs: Tensor) -> bool:
        if not (self.training and self.forward_mode.fused) or self.weight is None or self.bias is None:
            return False
        wide = self.weight.dtype
        half = inputs.dtype in (torch.float16, torch.bfloat16) and wide == torch.float32
        return inputs.device.type == "cpu" and self.forward_mode.shards is None and (inputs.dtype == wide or half)

    def _in_kernels(self, inputs: Tensor) -> Tensor:
        values = self._values(inputs)
        pretrained = self.pretrained_mean, self.pretrained_var
        outputs, mean, var = _MixedInKernels.apply(inputs, self.weight, self.bias, self.beta, *pretrained, self.eps)
        self._move_running(mean, var, values)
        return outputs

    def _in_arithmetic(self, inputs: Tensor) -> Tensor:
        shape = _by_channel(inputs)
        wide = self.running_mean.dtype  # statistics are not taken in half precision
        if self.training:
            # Sums instead of means, and an addition of -mean: their derivatives need no pass over the inputs.
            values = self._values(inputs)
            mean = self._sum(inputs, wide) * (1 / values)
            inputs = inputs + self._on_samples(-mean)[0].to(inputs.dtype).view(shape)
            # Centred first, so that nothing is lost to cancellation.
            centred = inputs.to(wide)
            var = self._sum(centred * centred, wide) * (1 / values)
            self._move_running(mean, var, values)
            offset = (1 - self.beta) * (mean - self.pretrained_mean)
        else:
            var = self.running_var
            offset = -self.pretrained_mean - self.beta * (self.running_mean - self.pretrained_mean)
        var = self.pretrained_var + self.beta * (var - self.pretrained_var)
        scale = torch.rsqrt(torch.add(var, self.eps))
        if self.weight is not None:
            scale = scale * self.weight
        shift = offset * scale
        if self.bias is not None:
            shift = shift + self.bias
        scale, shift = self._on_samples(scale, shift)
        return inputs * scale.to(inputs.dtype).view(shape) + shift.to(inputs.dtype).view(shape)

    def _sum(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """By channel, over the whole batch."""
        own = inputs.sum([0, *range(2, inputs.dim())], dtype=dtype)
        shards = self.forward_mode.shards
        return own if shards is None else shards.from_shards(own)[0]

    def _on_samples(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        shards = self.forward_mode.shards
        return tensors if shards is None else shards.to_shards(*tensors)

    def _values(self, inputs: Tensor) -> int:
        """How many values a channel has."""
        shards = self.forward_mode.shards
        samples = len(inputs) if shards is None else shards.total
        values = samples * inputs.shape[2:].numel()
        if values < 2:
            raise ModelError(
                f"Batch-norm layer '{self.layer_name}' got one value a channel (input shape {tuple(inputs.shape)}), "
                "from which no variance can be computed; use batches of at least two samples."
            )
        return values

    def _move_running(self, mean: Tensor, var: Tensor, values: int) -> None:
        """Replaces the running statistics by new tensors, moved towards those of a batch."""
        unbias = values / (values - 1)
        if not self.forward_mode.differentiable_statistics:
            mean, var = mean.detach(), var.detach()
        if self.momentum is None:
            self.num_batches_tracked = self.num_batches_tracked + 1
            rate = 1.0 / self.num_batches_tracked.to(mean.dtype)
            self.running_mean = torch.lerp(self.running_mean, mean, rate)
            self.running_var = torch.lerp(self.running_var, unbias * var, rate)
        else:
            # Scaled additions, since forward-mode differentiation is slow at products of a tensor and a number.
            self.running_mean = torch.lerp(self.running_mean, mean, self.momentum)
            step = torch.sub(var, self.running_var, alpha=1 / unbias)
            self.running_var = torch.add(self.running_var, step, alpha=self.momentum * unbias)

    def extra_repr(self) -> str:
        """The layer's settings, as `print(model)` shows them."""
        affine = self.weight is not None
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={affine}"


class MixedBatchNorm1d(MixedBatchNorm):
    """`MixedBatchNorm` for inputs of shape (N, J) or (N, J, L)."""

    dims = (2, 3)


class MixedBatchNorm2d(MixedBatchNorm):
    """`MixedBatchNorm` for inputs of shape (N, J, H, W)."""

    dims = (4,)


class MixedBatchNorm3d(MixedBatchNorm):
    """`MixedBatchNorm` for inputs of shape (N, J, D, H, W)."""

    dims = (5,)


_MIXED: dict[type[nn.Module], type[MixedBatchNorm]] = {
    nn.BatchNorm1d: MixedBatchNorm1d,
    nn.BatchNorm2d: MixedBatchNorm2d,
    nn.BatchNorm3d: MixedBatchNorm3d,
}


def convert_batchnorm(model: nn.Module) -> nn.Module:
    """Returns a copy of `model` in which every batch norm is a `MixedBatchNorm` with beta 0.

    The copy predicts what `model` predicts in evaluation mode. A module that stands in several places stands in the
    same places of the copy, converted once. Models without batch norm are copied as they are. Layers that
    hypergradients or `torch.vmap` cannot pass are replaced by others that answer the same (see `replacement_of`).

    Args:
        model: any module with `BatchNorm1d`, `2d` or `3d` at any depth. It is not changed.

    Returns:
        The converted copy.

    Raises:
        ModelError: a batch-norm layer cannot be mixed (a subclass with behaviour of its own, no running statistics),
            or two layers share one parameter tensor, which then could not have a learning rate for each.
    """
    _refuse_shared_parameters(model)
    # A copy that knows the new layers beforehand puts them in every place, lists of the model's own included.
    memo: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            memo[id(module)] = _convert_layer(module, name)
        elif (other := replacement_of(module)) is not None:
            memo[id(module)] = other
    return copy.deepcopy(model, memo)


def _is_timm_s(layer: nn.Module) -> bool:
    """Whether it is timm's batch norm with an activation, the one subclass whose behaviour is known."""
    return type(layer).__name__ == "BatchNormAct2d" and type(layer).__module__.startswith("timm.")


def _convert_layer(layer: _BatchNorm, name: str) -> MixedBatchNorm:
    kind = nn.BatchNorm2d if _is_timm_s(layer) else type(layer)
    if kind not in _MIXED:
        raise ModelError(
            f"Batch-norm layer '{name}' is a {type(layer).__name__}; only BatchNorm1d, BatchNorm2d, BatchNorm3d and "
            "timm's BatchNormAct2d can be mixed, since another subclass may behave otherwise."
        )
    kinds = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(kinds) or hasattr(layer, "parametrizations"):
        raise ModelError(
            f"Batch-norm layer '{name}' carries hooks or parametrizations, which a conversion would lose; remove them."
        )
    return _MIXED[kind](layer, layer_name=name)


def _refuse_shared_parameters(model: nn.Module) -> None:
    owners: dict[Tensor, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if parameter in owners:
                raise ModelError(
                    f"Parameters '{owners[parameter]}' and '{name}' are one tensor; each needs a tensor and a learning "
                    "rate of its own."
                )
            owners[parameter] = name


def batchnorm_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the B mixed batch-norm layers in definition order: the order of xi and beta."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, MixedBatchNorm))
