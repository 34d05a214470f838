"""What FedL2P is compared with: each a way to choose `Hyperparameters` (section 4.1.2 of the FedL2P paper)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedl2p.core.functional import FunctionalModel
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import BatchNormMode
from fedl2p.core.statistics import ClientStatistics
from fedl2p.errors import ConfigError, FederationError

MOST_RATES = 24  # a grid that has grown this long has no best inside


@dataclass(frozen=True)
class FixedRecipe:
    """The same hyperparameters for every client: one beta for all layers, one rate for all tensors.

    Attributes:
        batchnorm_count: B.
        parameter_count: P.
        beta: in [0, 1].
        rate: the learning rate.
    """

    batchnorm_count: int
    parameter_count: int
    beta: float
    rate: float

    @classmethod
    def fitting(cls, model: FunctionalModel, *, beta: float, rate: float) -> "FixedRecipe":
        """A recipe for a model."""
        return cls(len(model.batchnorm_names), len(model.parameter_names), beta, rate)

    def __call__(self, statistics: ClientStatistics) -> Hyperparameters:
        """The recipe; the statistics are not looked at."""
        reference = statistics.layer_moments
        return Hyperparameters(
            beta=reference.new_full((self.batchnorm_count,), self.beta),
            eta=reference.new_full((self.parameter_count,), self.rate),
        )


@dataclass(frozen=True)
class FineTuning:
    """A hand-made way to fine-tune, up to its learning rate.

    Attributes:
        label: as tables show it.
        beta: for all layers.
        bn_mode: at testing.
    """

    label: str
    beta: float
    bn_mode: BatchNormMode = BatchNormMode.running


FINE_TUNING: dict[str, FineTuning] = {
    "ft_bn_c": FineTuning("FT (BN C)", beta=1.0),
    "ft_bn_g": FineTuning("FT (BN G)", beta=0.0),
    "ft_bn_i": FineTuning("FT (BN I)", beta=1.0, bn_mode=BatchNormMode.batch),
}


def tune_rate(loss_of: Callable[[float], float], rates: Sequence[float]) -> tuple[float, dict[float, float]]:
    """Finds the rate with the lowest loss on a grid that grows until its best is inside.

    Where the best is the lowest (highest) rate, the next lower (higher) one is tried, in the ratio of the outermost
    two. A loss that is not finite counts as infinite; where all are, the next lower rate is tried.

    Args:
        loss_of: the validation loss of a rate; called once for each.
        rates: at least two, positive.

    Returns:
        The best rate, and the loss of each rate that was tried, in the order of rates.

    Raises:
        ConfigError: fewer than two rates, or one that is not positive.
        FederationError: at the end of a very long grid no rate has a finite loss, or the loss still falls.
    """
    grid = sorted(set(rates))
    if len(grid) < 2 or grid[0] <= 0:
        raise ConfigError(f"baselines.rates is {list(rates)}; allowed are two or more positive rates.")

    def measured(rate: float) -> float:
        loss = loss_of(rate)
        return loss if math.isfinite(loss) else math.inf

    losses = {rate: measured(rate) for rate in grid}
    while True:
        best = min(losses, key=lambda rate: losses[rate])
        diverges = math.isinf(losses[best])
        if grid[0] < best < grid[-1] and not diverges:
            return best, {rate: losses[rate] for rate in grid}
        if len(grid) >= MOST_RATES:
            if diverges:
                raise FederationError(f"Fine-tuning diverges at every rate tried, {grid[0]:g} to {grid[-1]:g}.")
            raise FederationError(
                f"The validation loss of fine-tuning still falls at the rate {best:g}, the end of a grid of "
                f"{len(grid)} rates; choose baselines.rates around the best."
            )
        new = grid[0] ** 2 / grid[1] if best == grid[0] or diverges else grid[-1] ** 2 / grid[-2]
        losses[new] = measured(new)
        grid = sorted(losses)


def derangement(count: int, seed: int) -> list[int]:
    """A permutation without fixed points, for the ablation in which clients get each other's statistics.

    Args:
        count: at least 2; a single client can only keep its own.
        seed: of the permutation.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    result = [0] * count
    for position, client in enumerate(order):
        result[client] = order[(position + 1) % count]
    return result
