"""How the tensors of many clients become one."""

import torch

from fedl2p.core.functional import Tensors


class WeightedMean:
    """The mean of tensors by name with weights, summed in float64 as they come, so that one set is held, not all."""

    def __init__(self) -> None:
        """Starts with nothing."""
        self.weight = 0.0
        self._sums: Tensors = {}
        self._like: Tensors = {}

    def add(self, weight: float, tensors: Tensors) -> None:
        """Takes one set in."""
        if not self._like:
            self._like = tensors
            self._sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in tensors.items()}
        self.weight += weight
        for name, total in self._sums.items():
            total.add_(tensors[name], alpha=weight)

    def result(self) -> Tensors:
        """The mean, in the types of the first set; integers are rounded."""
        means = {name: total / self.weight for name, total in self._sums.items()}
        return {
            name: (mean if self._like[name].is_floating_point() else mean.round()).to(self._like[name])
            for name, mean in means.items()
        }
