"""The interface of the estimators, and what they have in common."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, vjp
from torch.utils import _pytree as pytree

from fedl2p.core.convolution import TwiceDifferentiableConvolutions
from fedl2p.core.distributed import total_count
from fedl2p.core.finetune import EvaluationStatistics, FineTuned, InnerState, evaluation_batches, evaluation_loss
from fedl2p.core.functional import Batch, FunctionalModel, Tensors, gradients_or_zeros, recorded

with warnings.catch_warnings(), forward_ad.dual_level():
    # At its first use torch scripts the rules of forward mode, and warns its users that scripting is deprecated.
    warnings.simplefilter("ignore", FutureWarning)
    forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class MetaProblem(NamedTuple):
    """A client's bilevel problem after its inner loop: what an estimator looks at.

    Attributes:
        tuned: the fine-tuned state, with as much history as the estimator asked for.
        train_batches: the batches of the inner loop, one a step.
        loss_batch: the training batch on which `ift` takes L_T; None without training data.
        val_batches: the batches over which L_V is averaged.
        beta: shape (B,).
        eta: shape (P,).
        statistics: of the evaluation in L_V, see `evaluation_loss`.
    """

    tuned: FineTuned
    train_batches: Sequence[Batch]
    loss_batch: Batch | None
    val_batches: Sequence[Batch]
    beta: Tensor
    eta: Tensor
    statistics: EvaluationStatistics = "running"


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
    def __call__(self, model: FunctionalModel, problem: MetaProblem) -> Hypergradient:
        """The estimate at the fine-tuned state."""


def gradient_with_pull_back(
    objective: Callable[..., tuple[Tensor, Tensors]], *primals: Any, by_autograd: bool
) -> tuple[tuple[Tensors, Tensors], Callable[[tuple[Tensors, Tensors]], tuple[Any, ...]]]:
    """The gradient of a loss, and what pulls vectors back through it: reverse mode over reverse mode, on a kept graph.

    Args:
        objective: (*primals) -> loss, and other tensors by name.
        *primals: parameters by name, then any structures of floating-point tensors.
        by_autograd: whether `torch.autograd` does the work, see `FunctionalModel.takes_autograd`.

    Returns:
        The gradient by the parameters and the other tensors, and a function from a vector for each of the two to one
        for each of the primals.
    """
    if not by_autograd:
        return vjp(grad(objective, has_aux=True), *primals)[:2]
    flat, structure = pytree.tree_flatten(primals)
    leaves = [leaf.detach().requires_grad_() for leaf in flat]
    with recorded(), TwiceDifferentiableConvolutions():
        moved = pytree.tree_unflatten(leaves, structure)
        loss, others = objective(*moved)
        found = gradients_or_zeros(loss, list(moved[0].values()), create_graph=True)
    gradient = dict(zip(moved[0], found, strict=True))

    def pull_back(vectors: tuple[Tensors, Tensors]) -> tuple[Any, ...]:
        pairs = [*((g, vectors[0][n]) for n, g in gradient.items()), *((o, vectors[1][n]) for n, o in others.items())]
        pairs = [(output, vector) for output, vector in pairs if output.requires_grad]
        pulled = [torch.zeros_like(leaf) for leaf in leaves]  # where all is constant
        if pairs:
            outputs, directions = zip(*pairs, strict=True)
            pulled = list(torch.autograd.grad(outputs, leaves, directions, retain_graph=True, materialize_grads=True))
        result: tuple[Any, ...] = pytree.tree_unflatten(pulled, structure)
        return result

    values = {name: g.detach() for name, g in gradient.items()}, {name: o.detach() for name, o in others.items()}
    return values, pull_back


class ValidationGradient(NamedTuple):
    """L_V at the fine-tuned state and its partial derivatives there."""

    loss: Tensor
    parameters: Tensors
    running: Tensors
    beta: Tensor


def split_running(buffers: Tensors) -> tuple[Tensors, Tensors]:
    """Splits buffers in those that a gradient can reach (the client's running statistics) and all others."""
    running = {name: b for name, b in buffers.items() if name.rpartition(".")[2] in ("running_mean", "running_var")}
    return running, {name: b for name, b in buffers.items() if name not in running}


def validation_gradient(model: FunctionalModel, problem: MetaProblem) -> ValidationGradient:
    """L_V in evaluation mode, and its derivatives by parameters, running statistics and beta, batch by batch."""
    state = problem.tuned.final
    running, fixed = split_running(state.buffers)
    batches = evaluation_batches(problem.val_batches, problem.statistics)
    counts = [total_count(len(targets), model.group) for _, targets in batches]

    def loss(parameters: Tensors, running: Tensors, beta: Tensor, batch: Batch, share: float) -> tuple[Tensor, Tensor]:
        now = InnerState(parameters, {**running, **fixed})
        value = evaluation_loss(model, now, beta, [batch], statistics=problem.statistics)
        value = value * share
        return value, value

    result: ValidationGradient | None = None
    for batch, count in zip(batches, counts, strict=True):
        (dp, dr, db), value = grad(loss, argnums=(0, 1, 2), has_aux=True)(
            state.parameters, running, problem.beta, batch, count / sum(counts)
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


def last_step_gradient(model: FunctionalModel, problem: MetaProblem) -> Tensors:
    """The gradient g that the last inner step moved along, for all parameters."""
    before, batch = problem.tuned.history[-1], problem.train_batches[-1]

    def loss(parameters: Tensors) -> Tensor:
        return model.loss(parameters, before.buffers, problem.beta, batch, training=True)[0]

    return grad(loss)(before.parameters)
