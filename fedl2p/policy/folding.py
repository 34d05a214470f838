"""From a personalized model that mixes statistics to a plain one, whose batch norms have the mixed ones folded in."""

import copy

import torch
from torch import Tensor, nn

from fedl2p.core.batchnorm import MixedBatchNorm
from fedl2p.core.functional import FunctionalModel, InnerState


@torch.no_grad()
def fold(plain: nn.Module, model: FunctionalModel, state: InnerState, beta: Tensor) -> nn.Module:
    """A copy of the plain model that predicts what the personalized one does in evaluation mode.

    Args:
        plain: the model that was converted, with layers of its own classes; it is not changed.
        model: the same, converted.
        state: theta_i, and the buffers with the client's running statistics.
        beta: shape (B,).

    Returns:
        A copy of `plain` in evaluation mode with the personalized parameters. Its batch norms have the statistics
        `(1 - beta) * pretrained + beta * running`; `load_state_dict(strict=True)` of any such model takes its state.
    """
    folded = copy.deepcopy(plain).eval()
    own = dict(folded.named_parameters()) | dict(folded.named_buffers())
    names = _names_in(plain, model.module)
    betas = dict(zip(model.batchnorm_names, beta.unbind(), strict=True))
    for name, tensor in {**state.parameters, **state.buffers}.items():
        layer, _, kind = name.rpartition(".")
        if layer in betas and kind in ("beta", "pretrained_mean", "pretrained_var", "num_batches_tracked"):
            continue
        if layer in betas and kind in ("running_mean", "running_var"):
            pretrained = state.buffers[f"{layer}.{kind.replace('running', 'pretrained')}"]
            tensor = pretrained + betas[layer] * (tensor - pretrained)
        own[names.get(name, name)].copy_(tensor)
    return folded


def _names_in(plain: nn.Module, converted: nn.Module) -> dict[str, str]:
    """Tensors of the converted model that the plain one calls otherwise: those of activations in timm's batch norms."""
    result: dict[str, str] = {}
    for name, layer in converted.named_modules():
        if isinstance(layer, MixedBatchNorm) and layer.activation is not None:
            children = [child for child, _ in plain.get_submodule(name).named_children()]
            for key in layer.activation.state_dict():
                position, _, rest = key.partition(".")
                result[f"{name}.activation.{key}"] = f"{name}.{children[int(position)]}.{rest}"
    return result
