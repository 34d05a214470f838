"""What a client's data look like to the pretrained model: the inputs of BNNet and LRNet (Eq. 3 and 4).

One forward pass over the client's training data gives everything, with moments that are merged batch by batch in
float64, so memory does not grow with the data and nothing is lost to cancellation.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedl2p.core.batchnorm import MixedBatchNorm, batchnorm_names
from fedl2p.core.functional import arguments_of, batch_size
from fedl2p.errors import DataError

SD_EPS = 1e-5  # under the square root of SD, as in the authors' code


@dataclass(frozen=True, eq=False)
class ClientStatistics:
    """A client's data, as the pretrained model sees them.

    Attributes:
        bn_divergence: xi, shape (B,): the symmetric KL divergence between the client's and the pretrained feature
            distributions of every batch-norm layer, averaged over its channels (Eq. 3).
        layer_moments: E and SD of the input of each of the M learnable layers, shape (2M,): E, SD, E, SD, ... in
            definition order. A layer that the forward pass never reaches has 0 and 0 (and a batch norm there the
            pretrained statistics).
        channel_mean: by batch-norm layer, the mean of every channel of its input, shape (J,).
        channel_var: the same of the unbiased variance.
        num_samples: the number of training samples, N_i.
    """

    bn_divergence: Tensor
    layer_moments: Tensor
    channel_mean: dict[str, Tensor]
    channel_var: dict[str, Tensor]
    num_samples: int

    def net_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `MetaNets` reads: xi (B,), the moments (2M,), and N_i (0-d), all of one floating-point type."""
        count = self.layer_moments.new_tensor(float(self.num_samples))
        return self.bn_divergence, self.layer_moments, count


class _Moments:
    """Mean and unbiased variance of a stream, merged by the update of Chan, Golub and LeVeque (1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Takes in `count` new values of each quantity, of some mean and biased variance in float64."""
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + var * count + delta**2 * (self.count * count / total)
        self.count = total

    @property
    def variance(self) -> Tensor | float:
        """Unbiased; 0 where there is one value only."""
        return self.squares / max(self.count - 1, 1)


def learnable_layer_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the M modules that own parameters, in definition order: the order of `layer_moments`."""
    return tuple(name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)))


@torch.no_grad()
def collect_statistics(model: nn.Module, batches: Iterable[Any]) -> ClientStatistics:
    """Passes a client's data once through the pretrained model and measures what every layer gets.

    Args:
        model: a model from `convert_batchnorm`, with its pretrained parameters. It is run in evaluation mode with
            beta 0, that is as pretrained, and left as it was found.
        batches: the training data, without augmentation: (inputs, targets) pairs as `Batch` has them, or inputs alone
            where those are a tensor or a dict.

    Returns:
        The statistics, in the model's floating-point type.

    Raises:
        DataError: there is no data, or a statistic is not finite (layers named).
    """
    layers: dict[str, _Moments] = {name: _Moments() for name in learnable_layer_names(model)}
    channels: dict[str, _Moments] = {name: _Moments() for name in batchnorm_names(model)}
    modules: dict[str, Any] = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(_observer(layers.get(name), channels.get(name)), with_kwargs=True)
        for name in {**layers, **channels}
    ]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = [(module, module.training) for module in model.modules()]
    betas = {name: modules[name].beta for name in channels}
    num_samples = 0
    try:
        model.eval()
        for name, beta in betas.items():
            modules[name].beta = torch.zeros_like(beta)
        for batch in batches:
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            args, kwargs = arguments_of(pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs))
            with torch.autocast(device.type, enabled=False):
                model(*args, **kwargs)
            num_samples += batch_size(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for name, beta in betas.items():
            modules[name].beta = beta
        for module, mode in was_training:
            module.training = mode
    if num_samples == 0:
        raise DataError("A client without training data has no statistics; every client needs at least one sample.")
    return _summarize(model, layers, channels, num_samples)


def _observer(layer: _Moments | None, channel: _Moments | None) -> Callable[..., None]:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(iter((*args, *kwargs.values())), None)
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return
        if given.numel() == 0:
            return
        mean, var, count = _channel_moments(given)
        if layer is not None:
            layer.add(mean.mean(), var.mean() + mean.var(correction=0), given.numel())
        if channel is not None and given.dim() > 1:
            channel.add(mean, var, count)

    return observe


def _channel_moments(inputs: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance by channel, shape (J,), float64, and how many values each channel has.

    The passes over the inputs are in their own precision (float32 at least): one for the mean, and one around it, so
    that nothing is lost to cancellation, which also says by how much that mean was rounded. Batches are then merged in
    float64.
    """
    inputs = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    inputs = inputs[:, None] if inputs.dim() == 1 else inputs
    dims = [0, *range(2, inputs.dim())]
    count = inputs.numel() // inputs.shape[1]
    mean = inputs.sum(dims, keepdim=True) / count
    centred = inputs - mean
    rounded = centred.sum(dims).double() / count
    var = (centred * centred).sum(dims).double() / count - rounded**2
    return mean.flatten().double() + rounded, var, count


def _summarize(
    model: nn.Module, layers: dict[str, _Moments], channels: dict[str, _Moments], num_samples: int
) -> ClientStatistics:
    reference = next(model.parameters(), torch.zeros(()))
    modules = dict(model.named_modules())

    def tensor(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=reference.dtype, device=reference.device)

    divergences, means, variances = [], {}, {}
    for name, moments in channels.items():
        layer = modules[name]
        assert isinstance(layer, MixedBatchNorm)
        reached = moments.count > 0
        mean = torch.as_tensor(moments.mean if reached else layer.pretrained_mean, dtype=torch.float64)
        variance = torch.as_tensor(moments.variance if reached else layer.pretrained_var, dtype=torch.float64)
        divergences.append(symmetric_kl(mean, variance, layer.pretrained_mean, layer.pretrained_var, layer.eps))
        means[name], variances[name] = tensor(mean), tensor(variance)
    pairs = [[float(m.mean), float((m.variance + SD_EPS) ** 0.5) if m.count else 0.0] for m in layers.values()]
    _require_finite(pairs, list(layers), divergences, list(channels))
    return ClientStatistics(
        bn_divergence=tensor([float(d) for d in divergences]),
        layer_moments=tensor(pairs).reshape(-1),
        channel_mean=means,
        channel_var=variances,
        num_samples=num_samples,
    )


def _require_finite(
    pairs: list[list[float]], layer_names: list[str], divergences: list[Tensor], bn_names: list[str]
) -> None:
    values = {name: sum(pair) for name, pair in zip(layer_names, pairs, strict=True)}
    values |= {name: float(d) + values.get(name, 0.0) for name, d in zip(bn_names, divergences, strict=True)}
    bad = [name for name, value in values.items() if not torch.isfinite(torch.tensor(value))]
    if bad:
        raise DataError(
            f"The client's statistics are not finite from layer '{bad[0]}' on ({len(bad)} layers); its data hold "
            "NaN or infinite values, or the pretrained model does."
        )


def symmetric_kl(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, eps: float) -> Tensor:
    """The channel mean of (KL(P||Q) + KL(Q||P)) / 2 for normal distributions (Eq. 3), `eps` added to both variances.

    With variances a and b and difference of means d this is the mean of (a/b + b/a - 2 + d^2 (1/a + 1/b)) / 4.

    Args:
        mean: shape (J,).
        var: shape (J,).
        other_mean: shape (J,).
        other_var: shape (J,).
        eps: added to both variances.

    Returns:
        A 0-d tensor, zero where the distributions are equal.
    """
    a, b = var + eps, other_var + eps
    difference = mean - other_mean
    return ((a / b + b / a - 2 + difference**2 * (1 / a + 1 / b)) / 4).mean()
