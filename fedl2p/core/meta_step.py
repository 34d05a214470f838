"""One meta iteration as a pure function: from lambda and an episode to the hypergradient of lambda."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vjp

from fedl2p.core.differentiation import FUNC_TRANSFORMS, Differentiation
from fedl2p.core.episode import Episode
from fedl2p.core.finetune import FineTuned, active_parameters, finetune
from fedl2p.core.functional import FunctionalModel, InnerState, Tensors
from fedl2p.core.hypergradients import Hypergradient, HypergradientEstimator
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.settings import BatchNormMode, MetaLearningRates


class MetaStep(NamedTuple):
    """What a meta iteration gives; for a cohort, with a first dimension of its clients.

    Attributes:
        gradients: the clipped hypergradient of lambda by name, as `MetaNets.named_parameters`; zeros if not finite.
        val_loss: L_V after fine-tuning, 0-d.
        finite: whether the loss and the hypergradient were finite, 0-d bool.
        hyperparameters: the recipe that was in use.
    """

    gradients: Tensors
    val_loss: Tensor
    finite: Tensor
    hyperparameters: Hyperparameters


def meta_step(
    model: FunctionalModel,
    meta_nets: MetaNets,
    estimator: HypergradientEstimator,
    origin: InnerState,
    lambda_: Tensors,
    episode: Episode,
    *,
    clip_value: float = 1.0,
    bn_mode: BatchNormMode = BatchNormMode.running,
    active: Sequence[str] | None = None,
    differentiation: Differentiation = FUNC_TRANSFORMS,
) -> MetaStep:
    """Lines 9 and 10 of Algorithm 1 up to the hypergradient: recipe, fine-tuning, d L_V / d lambda.

    Args:
        model: the model.
        meta_nets: the structure of BNNet and LRNet.
        estimator: of the hypergradient by beta and eta, which the nets' own gradient carries on to lambda.
        origin: theta_g and the global model's buffers.
        lambda_: the parameters of `meta_nets`, by name.
        episode: one client's tensors.
        clip_value: bound of every entry of the hypergradient (by value).
        bn_mode: of the evaluation in L_V.
        active: names of the tensors that fine-tuning moves, see `active_in_episode`; None is all. Estimators take the
            gradients that they need by themselves.
        differentiation: how derivatives of the model are taken.

    Returns:
        The hypergradient and the losses. Where something is not finite, the gradients are 0 and `finite` is False.
    """

    def recipe(lambda_: Tensors) -> Hyperparameters:
        return functional_call(meta_nets, lambda_, episode.net_inputs)

    hyperparameters, pull_back = vjp(recipe, lambda_)[:2]
    estimate = hypergradient(
        model,
        estimator,
        origin,
        episode,
        hyperparameters,
        bn_mode=bn_mode,
        active=active,
        differentiation=differentiation,
    )
    with torch.autocast(hyperparameters.beta.device.type, enabled=False):
        (gradients,) = pull_back(Hyperparameters(estimate.beta, estimate.eta))
    sums = torch.stack([estimate.val_loss, *(g.sum() for g in gradients.values())])
    finite = torch.isfinite(sums).all()
    gradients = {
        name: torch.where(finite, g.clamp(-clip_value, clip_value), torch.zeros_like(g))
        for name, g in gradients.items()
    }
    return MetaStep(gradients, estimate.val_loss, finite, hyperparameters)


def hypergradient(
    model: FunctionalModel,
    estimator: HypergradientEstimator,
    origin: InnerState,
    episode: Episode,
    hyperparameters: Hyperparameters,
    *,
    bn_mode: BatchNormMode,
    active: Sequence[str] | None,
    differentiation: Differentiation,
) -> Hypergradient:
    """Fine-tunes with a recipe, and estimates how the validation loss changes with it; arguments as in `meta_step`."""
    history = estimator.history(len(episode.train_batches))
    tuned = personalize(
        model, origin, episode, hyperparameters, history=history, active=active, differentiation=differentiation
    )
    device = hyperparameters.beta.device.type
    with torch.autocast(device, enabled=False):  # products of gradients are too small for half precision
        return estimator(model, episode, tuned, hyperparameters, bn_mode=bn_mode, differentiation=differentiation)


def personalize(
    model: FunctionalModel,
    origin: InnerState,
    episode: Episode,
    hyperparameters: Hyperparameters,
    *,
    history: int = 0,
    active: Sequence[str] | None = None,
    differentiation: Differentiation = FUNC_TRANSFORMS,
) -> FineTuned:
    """Fine-tunes theta_g for one client with its recipe; arguments as in `meta_step` and `finetune`."""
    return finetune(
        model,
        episode.start(origin),
        episode.train_batches,
        *hyperparameters,
        history=history,
        active=active,
        differentiation=differentiation,
    )


def active_in_episode(
    model: FunctionalModel, meta_nets: MetaNets, lambda_: Tensors, episode: Episode
) -> tuple[str, ...]:
    """Names of the tensors that a meta iteration's fine-tuning moves, for any client; called outside `torch.vmap`.

    Args:
        model: the model.
        meta_nets: the structure of BNNet and LRNet.
        lambda_: the parameters of `meta_nets`: of one client, or stacked as the episode is.
        episode: of one client, or stacked.
    """

    def eta(lambda_: Tensors, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional_call(meta_nets, lambda_, inputs).eta

    with torch.no_grad():
        whole = eta if episode.cohort_size is None else torch.vmap(eta)
        return active_parameters(model, whole(lambda_, episode.net_inputs))


def meta_optimizer(lambda_: Tensors, meta_lr: MetaLearningRates) -> torch.optim.SGD:
    """SGD over lambda in three parameter groups, each with its own learning rate.

    SGD works entry by entry, so the lambdas of a cohort, stacked, are stepped as if each were alone.

    Args:
        lambda_: leaf tensors by the names of `MetaNets.named_parameters`.
        meta_lr: a learning rate for each of the three parts of lambda.
    """
    groups: list[dict[str, Any]] = []
    for group, rate in vars(meta_lr).items():
        tensors = [tensor for name, tensor in lambda_.items() if name.partition(".")[0] == group]
        if tensors:
            groups.append({"params": tensors, "lr": rate, "name": group})
    return torch.optim.SGD(groups)
