"""A model as a pure function of its tensors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fedl2p.core.batchnorm import FUNCTIONAL, FUSED, ForwardMode, MixedBatchNorm, batchnorm_names

Result = TypeVar("Result")
Tensors = dict[str, Tensor]
Inputs = Any
"""What a model takes: a tensor, a tuple of tensors (positional arguments), or a dict of them (keyword arguments)."""
Batch = tuple[Inputs, Any]
"""Inputs and targets; samples are along the first dimension of every tensor."""
LossFunction = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> mean loss over the batch, 0-d."""


class InnerState(NamedTuple):
    """Where fine-tuning stands: theta_i and the buffers (with the client's running statistics), by name."""

    parameters: Tensors
    buffers: Tensors


def expected_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean probability of a wrong answer, 1 - softmax(outputs)[target], in [0, 1].

    A validation loss for classification whose terms are bounded: on a handful of validation samples cross-entropy is
    ruled by the few that are confidently wrong, and rewards doubt more than right answers.

    Args:
        outputs: logits, shape (n, classes).
        targets: class indices, shape (n,).
    """
    return 1 - outputs.softmax(-1).gather(-1, targets[:, None]).mean()


def batch_size(tensors: Any) -> int:
    """Samples in a structure of tensors, along the first dimension."""
    return len(next(leaf for leaf in pytree.tree_leaves(tensors) if isinstance(leaf, Tensor)))


def concatenate(structures: Sequence[Any]) -> Any:
    """Joins equal structures of tensors along their first dimension."""
    flat = [pytree.tree_flatten(structure) for structure in structures]
    joined = [torch.cat(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
    return pytree.tree_unflatten(joined, flat[0][1])


def split_running(buffers: Tensors) -> tuple[Tensors, Tensors]:
    """Splits buffers in those that a gradient can reach (the client's running statistics) and all others."""
    running = {name: b for name, b in buffers.items() if name.rpartition(".")[2] in ("running_mean", "running_var")}
    return running, {name: b for name, b in buffers.items() if name not in running}


def ordinary(tensors: Any) -> Any:
    """A structure of tensors with copies of those that were made in inference mode, which nothing can be derived by."""
    leaves, structure = pytree.tree_flatten(tensors)
    if not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves):
        return tensors
    with torch.inference_mode(False):
        copies = [leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf for leaf in leaves]
    return pytree.tree_unflatten(copies, structure)


def outside_inference_mode(function: Callable[..., Result]) -> Callable[..., Result]:
    """Lets a function take derivatives in inference mode too, where `torch.func` of some versions silently finds none.

    A Lightning Trainer tests in that mode.
    """

    @wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Result:
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return function(*ordinary(args), **ordinary(kwargs))

    return outside


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Keeps autocast from remembering casts of parameters: each step has new ones, and those under a transform end."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments with which a model is called on a batch's inputs."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


@dataclass(frozen=True, eq=False)
class FunctionalModel:
    """A converted model as a pure function of its tensors, and the losses it is trained with.

    Attributes:
        module: a model from `convert_batchnorm`; only its structure is used, and its training mode is left as the last
            call needed it.
        loss_fn: what fine-tuning lowers (L_T).
        val_loss_fn: what the nets lower and what everything is selected by (L_V).
        batchnorm_names: the B mixed layers, in the order of beta.
        parameter_names: the P parameter tensors, in the order of eta.
    """

    module: nn.Module
    loss_fn: LossFunction
    val_loss_fn: LossFunction
    batchnorm_names: tuple[str, ...]
    parameter_names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        loss_fn: LossFunction = nn.functional.cross_entropy,
        val_loss_fn: LossFunction | None = None,
    ) -> "FunctionalModel":
        """Wraps a model from `convert_batchnorm`; without a `val_loss_fn`, L_V is taken with `loss_fn` too."""
        names = tuple(name for name, _ in module.named_parameters())
        return cls(module, loss_fn, val_loss_fn or loss_fn, batchnorm_names(module), names)

    @cached_property
    def _layers(self) -> tuple[MixedBatchNorm, ...]:
        return tuple(layer for layer in self.module.modules() if isinstance(layer, MixedBatchNorm))

    def tensors(self) -> tuple[Tensors, Tensors]:
        """The module's own parameters and buffers (theta_g and its statistics), detached, not copied."""
        parameters = {name: p.detach() for name, p in self.module.named_parameters()}
        return parameters, {name: b.detach() for name, b in self.module.named_buffers()}

    def __call__(
        self,
        parameters: Tensors,
        buffers: Tensors,
        beta: Tensor,
        inputs: Inputs,
        *,
        training: bool,
        batch_statistics: bool | None = None,
        fused: bool = False,
    ) -> tuple[Any, Tensors]:
        """Runs the model.

        Args:
            parameters: every parameter, by name.
            buffers: every buffer, by name; those of beta are replaced.
            beta: shape (B,).
            inputs: a batch's.
            training: training mode (batch statistics, dropout) or evaluation mode (running statistics).
            batch_statistics: whether the mixed batch norms take batch statistics; None follows `training`.
            fused: whether training mode may be taken in PyTorch's kernels, which are differentiable once, by inputs
                and parameters, by `torch.autograd` alone.

        Returns:
            The outputs, and the buffers afterwards (new tensors where the pass changed them).
        """
        self.module.train(training)
        takes_batch = training if batch_statistics is None else batch_statistics
        parameters, mode = self._spread(parameters, inputs, FUSED if fused else FUNCTIONAL, training or takes_batch)
        for layer in self._layers:
            layer.forward_mode = mode
            layer.train(takes_batch)
        betas = {f"{name}.beta": value for name, value in zip(self.batchnorm_names, beta.unbind(-1), strict=True)}
        # Other layers (a tracking instance norm, say) write into their buffers, which are the caller's.
        kept = {name: b.clone() if training and not self._mixed(name) else b for name, b in buffers.items()}
        state = {**parameters, **kept, **betas}
        args, kwargs = arguments_of(inputs)
        # Of the kinds of attention only the one in plain arithmetic has second derivatives.
        # Modules may stand in several places, but no two share a tensor (convert_batchnorm), so nothing is tied.
        try:
            with _uncached_autocast(), sdpa_kernel(SDPBackend.MATH):
                outputs = functional_call(self.module, state, args, kwargs, tie_weights=False)
        finally:
            for layer in self._layers:
                layer.forward_mode = ForwardMode()
        return outputs, {name: state[name] for name in buffers}

    def _mixed(self, tensor_name: str) -> bool:
        return tensor_name.rpartition(".")[0] in self.batchnorm_names

    def _spread(
        self, parameters: Tensors, inputs: Inputs, mode: ForwardMode, sums: bool
    ) -> tuple[Tensors, ForwardMode]:
        """The parameters as they are used on samples, and the batch norms' mode; `sums`: over the whole batch."""
        return parameters, mode

    def loss(
        self, parameters: Tensors, buffers: Tensors, beta: Tensor, batch: Batch, *, training: bool, fused: bool = False
    ) -> tuple[Tensor, Tensors]:
        """The mean loss over a batch (0-d), and the buffers afterwards; arguments as in `__call__`."""
        inputs, targets = batch
        outputs, buffers = self(parameters, buffers, beta, inputs, training=training, fused=fused)
        return self.mean_over_samples(self.loss_fn, outputs, targets), buffers

    def mean_over_samples(self, loss_fn: LossFunction, outputs: Any, targets: Any) -> Tensor:
        """A mean loss over the samples of a batch."""
        return loss_fn(outputs, targets)

    def count_samples(self, batch: Batch) -> int:
        """Samples in a batch."""
        return batch_size(batch[1])
