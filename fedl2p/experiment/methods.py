"""What FedL2P is compared with: each a way to choose `Hyperparameters` (section 4.1.2 of the FedL2P paper)."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedl2p.core.functional import FunctionalModel
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import BatchNormMode
from fedl2p.core.statistics import ClientStatistics
from fedl2p.errors import ConfigError, FederationError
from fedl2p.experiment.schema import Config

MAX_RATES = 24  # a grid that has grown this long has no best inside
NO_RATE_HELPS = "no rate lowered the validation loss; the lowest one was taken"


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
        relative_gradients: whether a tensor's rate follows the size of its gradient relative to its own (Auto-RGN).
    """

    label: str
    beta: float
    bn_mode: BatchNormMode = BatchNormMode.running
    relative_gradients: bool = False


FINE_TUNING: dict[str, FineTuning] = {
    "ft_bn_c": FineTuning("FT (BN C)", beta=1.0),
    "ft_bn_g": FineTuning("FT (BN G)", beta=0.0),
    "ft_bn_i": FineTuning("FT (BN I)", beta=1.0, bn_mode=BatchNormMode.batch),
}


def tuned_methods(config: Config) -> dict[str, FineTuning]:
    """All hand-made methods of a run whose rate is tuned.

    Auto-RGN is of Lee et al., Surgical Fine-Tuning Improves Adaptation to Distribution Shifts (ICLR 2023, arXiv
    2210.11466), with its relative norms measured once, at theta_g, and with the client's own batch statistics.
    """
    if not config.baselines.auto_rgn:
        return FINE_TUNING
    bn_mode = config.client.evaluation_statistics
    return FINE_TUNING | {"auto_rgn": FineTuning("Auto-RGN", beta=1.0, bn_mode=bn_mode, relative_gradients=True)}


def tune_rate(loss_of: Callable[[float], float], rates: Sequence[float]) -> tuple[float, dict[float, float]]:
    """Finds the rate with the lowest loss on a grid that grows until its best is inside.

    Where the best is the lowest (highest) rate, the next lower (higher) one is tried, in the ratio of the outermost
    two. A loss that is not finite counts as infinite; where all are, the next lower rate is tried. Where no rate helps,
    since all diverge or the loss still falls at the low end of a very long grid, the lowest rate is the answer.

    Args:
        loss_of: the validation loss of a rate; called once for each.
        rates: at least two, positive.

    Returns:
        The best rate, and the loss of each rate that was tried, in the order of rates. The best is the lowest of them
        only where no rate helps.

    Raises:
        ConfigError: fewer than two rates, or one that is not positive.
        FederationError: the loss still falls at the high end of a very long grid.
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
        if len(grid) >= MAX_RATES:
            if diverges or best == grid[0]:
                return grid[0], {rate: losses[rate] for rate in grid}
            raise FederationError(
                f"The validation loss of fine-tuning still falls at the rate {best:g}, the end of a grid of "
                f"{len(grid)} rates; choose baselines.rates around the best."
            )
        new = grid[0] ** 2 / grid[1] if best == grid[0] or diverges else grid[-1] ** 2 / grid[-2]
        losses[new] = measured(new)
        grid = sorted(losses)


@dataclass(frozen=True)
class TunedRate:
    """The learning rate of a hand-made recipe.

    Attributes:
        rate: that was chosen.
        val_loss: of the seen clients with it; infinite where fine-tuning diverges, NaN where it was not measured.
        grid: the rates that were tried, each with its loss.
        helps: whether the rate is better than the lowest that was tried.
    """

    rate: float
    val_loss: float = math.nan
    grid: tuple[tuple[float, float], ...] = ()
    helps: bool = True

    def as_dict(self) -> dict[str, Any]:
        """As in `results.json`; where no rate helps it says so."""
        values: dict[str, Any] = {
            "rate": self.rate,
            "val_loss": self.val_loss,
            "grid": [list(row) for row in self.grid],
        }
        return values if self.helps else values | {"note": NO_RATE_HELPS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TunedRate":
        """From JSON, in which an infinite loss is null."""
        grid = tuple((rate, math.inf if loss is None else loss) for rate, loss in values["grid"])
        return cls(values["rate"], dict(grid)[values["rate"]], grid, "note" not in values)


def given_rates(rates: Mapping[str, float], names: Collection[str] = tuple(FINE_TUNING)) -> dict[str, TunedRate]:
    """The rates of `baselines.tuned_rates`, which nothing was measured for.

    Args:
        rates: by method.
        names: of the methods of the run.

    Raises:
        ConfigError: not one for each method.
    """
    if set(rates) != set(names):
        raise ConfigError(
            f"baselines.tuned_rates is {dict(rates)}; where baselines.tune is false, allowed is a rate for each of "
            f"{', '.join(names)}."
        )
    return {name: TunedRate(rates[name]) for name in names}


def best_fine_tuning(rates: Mapping[str, TunedRate]) -> str | None:
    """The method with the lowest validation loss on the seen clients; None where no loss was measured."""
    measured = {name: chosen.val_loss for name, chosen in rates.items() if not math.isnan(chosen.val_loss)}
    return min(measured, key=lambda name: measured[name]) if measured else None


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
