"""The interface of the estimators, and what they have in common."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from fedl2p.core.differentiation import FUNC_TRANSFORMS, Differentiation
from fedl2p.core.episode import Episode
from fedl2p.core.finetune import FineTuned, evaluation_batches, evaluation_loss
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, Tensors, outside_inference_mode, split_running
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import BatchNormMode


class Hypergradient(NamedTuple):
    """An estimate of d L_V / d beta (B,) and d L_V / d eta (P,), not clipped, and L_V itself (0-d)."""

    beta: Tensor
    eta: Tensor
    val_loss: Tensor


class HypergradientEstimator(ABC):
    """Estimates how the validation loss after fine-tuning changes with beta and eta.

    Pure: an estimator holds settings only, changes nothing, and runs under `torch.vmap`.
    """

    @abstractmethod
    def history(self, num_steps: int) -> int:
        """How many of the last inner states `finetune` must keep, of `num_steps`."""

    @abstractmethod
    def __call__(
        self,
        model: FunctionalModel,
        episode: Episode,
        tuned: FineTuned,
        hyperparameters: Hyperparameters,
        *,
        bn_mode: BatchNormMode = BatchNormMode.running,
        differentiation: Differentiation = FUNC_TRANSFORMS,
    ) -> Hypergradient:
        """The estimate at the fine-tuned state.

        Args:
            model: the model.
            episode: the client's data.
            tuned: what fine-tuning on `episode.train_batches` gave, with the history that was asked for.
            hyperparameters: the recipe that was in use, detached.
            bn_mode: of the validation loss, see `evaluation_loss`.
            differentiation: how derivatives are taken.
        """


class ValidationGradient(NamedTuple):
    """L_V at the fine-tuned state and its partial derivatives there."""

    loss: Tensor
    parameters: Tensors
    running: Tensors
    beta: Tensor


@outside_inference_mode
def validation_gradient(
    model: FunctionalModel, episode: Episode, state: InnerState, beta: Tensor, bn_mode: BatchNormMode
) -> ValidationGradient:
    """L_V in evaluation mode, and its derivatives by parameters, running statistics and beta, batch by batch."""
    running, fixed = split_running(state.buffers)
    batches = evaluation_batches(episode.val_batches, bn_mode)
    counts = [model.count_samples(batch) for batch in batches]

    def loss(parameters: Tensors, running: Tensors, beta: Tensor, batch: Batch, share: float) -> tuple[Tensor, Tensor]:
        now = InnerState(parameters, {**running, **fixed})
        value = evaluation_loss(model, now, beta, [batch], bn_mode=bn_mode) * share
        return value, value

    result: ValidationGradient | None = None
    for batch, count in zip(batches, counts, strict=True):
        (dp, dr, db), value = grad(loss, argnums=(0, 1, 2), has_aux=True)(
            state.parameters, running, beta, batch, count / sum(counts)
        )
        term = ValidationGradient(value, dp, dr, db)
        result = term if result is None else _add(result, term)
    assert result is not None, "a client has at least one validation batch"
    return result


def _add(a: ValidationGradient, b: ValidationGradient) -> ValidationGradient:
    return ValidationGradient(
        a.loss + b.loss, add(a.parameters, b.parameters), add(a.running, b.running), a.beta + b.beta
    )


def add(a: Tensors, b: Tensors, scale: float = 1.0) -> Tensors:
    """A + scale * b, name by name."""
    return {name: torch.add(a[name], b[name], alpha=scale) for name in a}


def dot_by_tensor(a: Tensors, b: Tensors) -> Tensor:
    """The inner product of each pair of tensors, shape (P,)."""
    return torch.stack([(a[name] * b[name]).sum() for name in a])


@outside_inference_mode
def last_step_gradient(model: FunctionalModel, episode: Episode, tuned: FineTuned, beta: Tensor) -> Tensors:
    """The gradient g that the last inner step moved along, for all parameters."""
    before, batch = tuned.history[-1], episode.train_batches[-1]

    def loss(parameters: Tensors) -> Tensor:
        return model.loss(parameters, before.buffers, beta, batch, training=True)[0]

    return grad(loss)(before.parameters)
