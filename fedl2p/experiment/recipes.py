"""Recipes that are compared: the same for every client, or by the gradients of its own training data."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.func import grad

from fedl2p.core.episode import Episode
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, Tensors
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.experiment.methods import FineTuning, FixedRecipe
from fedl2p.federation.runtime import ClientRuntime

Recipe = Callable[[int], Hyperparameters]
"""A client's hyperparameters by its id."""


def fixed_recipe(runtime: ClientRuntime, beta: float, rate: float) -> Recipe:
    """The same beta and rate for every client and layer."""
    recipe = FixedRecipe.fitting(runtime.model, beta=beta, rate=rate)
    return lambda client_id: recipe(runtime.statistics(client_id))


def hand_made(runtime: ClientRuntime, method: FineTuning) -> Callable[[float], Recipe]:
    """The recipes of a hand-made method by its rate; what it reads of a client is read once for all rates."""
    if not method.relative_gradients:
        return lambda rate: fixed_recipe(runtime, method.beta, rate)

    @cache
    def shares(client_id: int) -> Tensor:
        episode = runtime.personal_episode(client_id, ())
        steps = len(episode.train_batches) // max(1, runtime.settings.finetune_epochs)
        return rate_shares(relative_gradient_norms(runtime.model, runtime.learner.origin, episode, steps, method.beta))

    def with_rate(rate: float) -> Recipe:
        fixed = fixed_recipe(runtime, method.beta, rate)

        def recipe(client_id: int) -> Hyperparameters:
            beta, eta = fixed(client_id)
            return Hyperparameters(beta, eta * shares(client_id).to(eta))

        return recipe

    return with_rate


def relative_gradient_norms(
    model: FunctionalModel, origin: InnerState, episode: Episode, steps: int, beta: float
) -> Tensor:
    """How large the training loss's gradient by each tensor is, relative to that tensor, at theta_g (Lee et al. 2023).

    Args:
        model: the model.
        origin: theta_g and the global model's buffers.
        episode: of one client.
        steps: how many training batches are looked at, from the first on: those of a pass over the data.
        beta: of all batch norms, in training mode.

    Returns:
        The mean over the batches of |gradient| / |tensor| (Euclidean), shape (P,); not finite for a tensor of zeros.
    """
    state = episode.start(origin)
    reference = next(iter(state.parameters.values()))
    betas = reference.new_full((len(model.batchnorm_names),), beta)

    def ratios(batch: Batch) -> Tensor:
        def loss(parameters: Tensors) -> Tensor:
            return model.loss(parameters, state.buffers, betas, batch, training=True)[0]

        gradients = grad(loss)(state.parameters)
        return torch.stack([gradients[name].norm() / state.parameters[name].norm() for name in model.parameter_names])

    batches = episode.train_batches[:steps]
    if not batches:
        return reference.new_ones(len(model.parameter_names))
    return torch.stack([ratios(batch) for batch in batches]).mean(0)


def rate_shares(norms: Tensor) -> Tensor:
    """The part of the base rate that each tensor gets: its relative norm over the largest one.

    Args:
        norms: relative gradient norms, shape (P,).

    Returns:
        Shape (P,), from 0 to 1. A tensor of zeros, of which nothing is large, gets the whole rate.
    """
    finite = torch.isfinite(norms)
    largest = torch.where(finite, norms, 0).max()
    return torch.where(finite & (largest > 0), norms / largest, 1.0)


def mean_recipe(recipes: Sequence[Hyperparameters]) -> Hyperparameters:
    """One recipe for everybody: the mean of beta and the mean of eta over clients.

    Args:
        recipes: one a client, at least one.
    """
    betas, etas = zip(*recipes, strict=True)
    return Hyperparameters(torch.stack(betas).mean(0), torch.stack(etas).mean(0))
