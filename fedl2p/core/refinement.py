"""Refinement: a client betters a recipe that it was given, by hypergradients on its own validation data.

Only the learning rates move. On a handful of validation samples the hypergradients of some of them (of inner layers, in
trials) agree with those on other samples of the client; that of beta is mostly noise, with a few very large values.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedl2p.core.differentiation import FUNC_TRANSFORMS, Differentiation
from fedl2p.core.episode import Episode
from fedl2p.core.functional import FunctionalModel, InnerState
from fedl2p.core.hypergradients import HypergradientEstimator
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.meta_step import hypergradient
from fedl2p.core.settings import BatchNormMode, RefinementSettings

SHORTER = 0.25
"""What a step that raised the validation loss is shortened by."""


class Refined(NamedTuple):
    """A refined recipe.

    Attributes:
        hyperparameters: the best recipe that was found: beta as given, eta with the signs and the zeros that it had.
        val_losses: the validation loss of the recipe as given and of the one that each step tried, shape (steps + 1,);
            infinite where it was not finite.
        accepted: whether each step was taken, shape (steps,), bool.
    """

    hyperparameters: Hyperparameters
    val_losses: Tensor
    accepted: Tensor


class _Point(NamedTuple):
    log_factor: Tensor  # eta is the given one times its exponential
    val_loss: Tensor
    gradient: Tensor  # of val_loss by log_factor


def refine(
    model: FunctionalModel,
    estimator: HypergradientEstimator,
    origin: InnerState,
    episode: Episode,
    hyperparameters: Hyperparameters,
    settings: RefinementSettings,
    *,
    bn_mode: BatchNormMode = BatchNormMode.running,
    active: Sequence[str] | None = None,
    differentiation: Differentiation = FUNC_TRANSFORMS,
) -> Refined:
    """Descends on log eta, from a recipe, with steps that are undone and shortened where the validation loss rises.

    So the validation loss of the refined recipe is never above that of the given one. A recipe that
    does not fine-tune to a finite loss has all its rates lowered by the longest step, until it does.

    Works for one client, and under `torch.vmap` for a cohort. Test data are not looked at.

    Args:
        model: the model.
        estimator: of the hypergradient; `Unrolled` is exact.
        origin: theta_g and the global model's buffers.
        episode: the client's tensors, with validation data.
        hyperparameters: the recipe to start from.
        settings: how many steps, and how long.
        bn_mode: of the evaluation in the validation loss.
        active: names of the tensors whose eta is not 0, see `active_parameters`; None is all.
        differentiation: how derivatives of the model are taken.
    """
    beta, eta = (t.detach() for t in hyperparameters)

    def at(log_factor: Tensor) -> _Point:
        recipe = Hyperparameters(beta, eta * log_factor.exp())
        estimate = hypergradient(
            model,
            estimator,
            origin,
            episode,
            recipe,
            bn_mode=bn_mode,
            active=active,
            differentiation=differentiation,
        )
        gradient = estimate.eta * recipe.eta
        usable = torch.isfinite(estimate.val_loss) & torch.isfinite(gradient).all()
        loss = torch.where(usable, estimate.val_loss, math.inf)
        return _Point(log_factor, loss, torch.where(usable, gradient, math.inf))

    best = at(torch.zeros_like(eta))
    size = torch.full_like(best.val_loss, settings.step_size)
    losses, accepted = [best.val_loss], []
    for _ in range(settings.steps):
        move = (size * best.gradient).clamp(-settings.longest_step, settings.longest_step)
        tried = at((best.log_factor - move).clamp(-settings.farthest, settings.farthest))
        better = (tried.val_loss < best.val_loss) | torch.isinf(best.val_loss)
        best = _Point(*(torch.where(better, new, old) for new, old in zip(tried, best, strict=True)))
        size = torch.where(better, size, SHORTER * size)
        losses.append(tried.val_loss)
        accepted.append(better)
    taken = torch.stack(accepted) if accepted else torch.zeros(0, dtype=torch.bool, device=eta.device)
    return Refined(Hyperparameters(beta, eta * best.log_factor.exp()), torch.stack(losses), taken)
