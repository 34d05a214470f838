"""Layers that torch cannot differentiate twice, or not under `torch.vmap`, in forms that it can, with equal answers."""

import torch
from torch import Tensor, nn


class Hardsigmoid(nn.Module):
    """`torch.nn.Hardsigmoid`, whose own gradient has no derivative."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape and values as there."""
        return nn.functional.relu6(inputs + 3) / 6


class StochasticDepth(nn.Module):
    """`torchvision.ops.StochasticDepth`, whose own noise is drawn in place, which `torch.vmap` refuses."""

    def __init__(self, p: float, mode: str) -> None:
        """Args as there: the probability of a zero, and `row` (each sample) or `batch` (all together)."""
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, inputs: Tensor) -> Tensor:
        """In training mode scaled inputs or zeros, otherwise the inputs."""
        if not self.training or self.p == 0.0:
            return inputs
        if self.p == 1.0:
            return inputs * 0.0
        rows = len(inputs) if self.mode == "row" else 1
        survivors = inputs.new_full((rows, *[1] * (inputs.dim() - 1)), 1 - self.p)
        return inputs * torch.bernoulli(survivors) / (1 - self.p)


def replacement_of(module: nn.Module) -> nn.Module | None:
    """What takes the place of a module; None leaves it as it is."""
    kind = type(module)
    if kind is nn.Hardsigmoid:
        return Hardsigmoid().train(module.training)
    # By name, since whoever has no such layer should not wait for torchvision.
    if kind.__name__ == "StochasticDepth" and kind.__module__ == "torchvision.ops.stochastic_depth":
        return StochasticDepth(module.p, module.mode).train(module.training)  # type: ignore[arg-type]  # as there
    return None
