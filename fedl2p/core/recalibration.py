"""Running statistics that are measured again, through the beta in use, as a model needs them that is to be served.

Fine-tuning moves a layer's inputs, and so does the mixing in all layers before it. Statistics that were measured in the
pretrained model, or that followed a few training batches with momentum, are then those of other inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedl2p.core.batchnorm import MixedBatchNorm
from fedl2p.core.functional import FunctionalModel, InnerState, Inputs, Tensors, batch_size, concatenate

LARGEST = 1024
"""How many samples are measured at once, unless something else is asked for."""


def recalibrated_running(
    model: FunctionalModel, state: InnerState, beta: Tensor, inputs: Sequence[Inputs], *, largest: int = LARGEST
) -> Tensors:
    """The running statistics of data in a model that mixes by `beta`.

    One forward pass. Each layer takes the statistics of its inputs, which have been through the layers before it,
    mixed with these same statistics; everything else is in evaluation mode. Data of at most `largest` samples go as
    one batch, and the result is exact: with it, evaluation normalizes as the pass did (but for the factor
    n / (n - 1) of unbiased variances). More data go as several batches of nearly equal size, whose statistics are
    merged.

    A pure function: it works under `torch.vmap`, and gradients flow through it. A layer whose momentum is 0 keeps the
    statistics that it has.

    Args:
        model: the model.
        state: theta_i and the buffers.
        beta: shape (B,).
        inputs: the data in batches of any size, without augmentation.
        largest: the most samples of one batch; more need more memory.

    Returns:
        The buffers that take the place of those in `state`, by name.

    Raises:
        ModelError: a channel has one value only.
    """
    batches = _regrouped(inputs, largest)
    total = sum(batch_size(batch) for batch in batches)
    weights = [batch_size(batch) / total for batch in batches]
    measured = [_statistics(model, state, beta, batch) for batch in batches]
    result: Tensors = {}
    for name in measured[0]:
        mean = torch.stack([w * mean for w, mean in zip(weights, (m[name][0] for m in measured), strict=True)]).sum(0)
        within = torch.stack([w * m[name][1] for w, m in zip(weights, measured, strict=True)]).sum(0)
        between = torch.stack([w * (m[name][0] - mean) ** 2 for w, m in zip(weights, measured, strict=True)]).sum(0)
        result |= {f"{name}.running_mean": mean, f"{name}.running_var": within + between}
    return result


def _regrouped(batches: Sequence[Inputs], largest: int) -> list[Inputs]:
    """The same samples in as few batches as possible, of nearly equal size."""
    whole = concatenate(batches)
    leaves, structure = pytree.tree_flatten(whole)
    parts = -(-batch_size(whole) // largest)
    split = [torch.tensor_split(leaf, parts) for leaf in leaves]
    return [pytree.tree_unflatten(list(part), structure) for part in zip(*split, strict=True)]


def _statistics(
    model: FunctionalModel, state: InnerState, beta: Tensor, inputs: Inputs
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of each layer's inputs in one batch, by the layer's name."""
    layers = {name: layer for name, layer in model.module.named_modules() if isinstance(layer, MixedBatchNorm)}
    moving = {name: layer for name, layer in layers.items() if layer.momentum != 0}
    # From zero, one batch moves running statistics to `momentum` times its own.
    tails = ("running_mean", "running_var", "num_batches_tracked")
    zero = {f"{name}.{tail}" for name in moving for tail in tails} & set(state.buffers)
    start = {key: torch.zeros_like(b) if key in zero else b for key, b in state.buffers.items()}
    moved = model(state.parameters, start, beta, inputs, training=False, batch_statistics=True)[1]
    return {
        name: (moved[f"{name}.running_mean"] / rate, moved[f"{name}.running_var"] / rate)
        for name, rate in ((name, layer.momentum or 1.0) for name, layer in moving.items())
    }
