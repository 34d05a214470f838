"""A model as a pure function of its tensors, and how derivatives of it are taken."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fedl2p.core.batchnorm import MixedBatchNorm, batchnorm_names
from fedl2p.core.distributed import Shards

if TYPE_CHECKING:
    from fedl2p.core.finetune import CompiledStep

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]


def expected_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean probability of a wrong answer, 1 - softmax(outputs)[target], in [0, 1].

    A validation loss for classification whose terms are bounded: on a handful of validation samples cross-entropy is
    ruled by the few that are confidently wrong, and rewards doubt more than right answers.

    Args:
        outputs: logits, shape (n, classes).
        targets: class indices, shape (n,).
    """
    return 1 - outputs.softmax(-1).gather(-1, targets[:, None]).mean()


VALIDATION_LOSSES: dict[str, LossFunction] = {
    "cross_entropy": nn.functional.cross_entropy,
    "expected_error": expected_error,
}


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Keeps autocast from remembering casts of parameters: each step has new ones, and those under a transform end."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@dataclass(frozen=True, eq=False)
class FunctionalModel:
    """A converted model as a pure function of its tensors, and the loss it is trained with.

    Attributes:
        module: a model from `convert_batchnorm`; only its structure is used, and its training mode is left as the last
            call needed it.
        loss_fn: (outputs, targets) -> mean loss over the batch, 0-d; what fine-tuning lowers (L_T).
        val_loss_fn: likewise; what the nets lower and what everything is selected by (L_V).
        batchnorm_names: the B mixed layers, in the order of beta.
        parameter_names: the P parameter tensors, in the order of eta.
        group: the processes that share each batch, as `torch.distributed` knows them; None is this one alone.
        compiled: `inner_step`, compiled, which `finetune` then takes; None is as it is.
        alone: whether this is for one client, outside of the transforms of `torch.func`; `torch.autograd` then takes
            derivatives, which is faster, unless steps are compiled.
        fused_batchnorm: whether the inner steps of a client alone take batch norms in PyTorch's kernels; faster for
            large networks, and with a rounding of their own.
    """

    module: nn.Module
    loss_fn: LossFunction
    val_loss_fn: LossFunction
    batchnorm_names: tuple[str, ...]
    parameter_names: tuple[str, ...]
    group: Any = None
    compiled: "CompiledStep | None" = None
    alone: bool = False
    fused_batchnorm: bool = False

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
        inputs: Tensor,
        *,
        training: bool,
        batch_statistics: bool | None = None,
    ) -> tuple[Tensor, Tensors]:
        """Runs the model.

        Args:
            parameters: every parameter, by name.
            buffers: every buffer, by name; those of beta are replaced.
            beta: shape (B,).
            inputs: a batch.
            training: training mode (batch statistics, dropout) or evaluation mode (running statistics).
            batch_statistics: whether the mixed batch norms take batch statistics; None follows `training`.

        Returns:
            The outputs, and the buffers afterwards (new tensors where the pass changed them).
        """
        self.module.train(training)
        for layer in self._layers:
            layer.differentiable_statistics = True
            if batch_statistics is not None:
                layer.train(batch_statistics)
        betas = {f"{name}.beta": value for name, value in zip(self.batchnorm_names, beta.unbind(-1), strict=True)}
        # Other layers (a tracking instance norm, say) write into their buffers, which are the caller's.
        kept = {name: b.clone() if training and not self._mixed(name) else b for name, b in buffers.items()}
        if self.group is not None:
            parameters = self._shared(parameters, inputs, training=training or bool(batch_statistics))
        state = {**parameters, **kept, **betas}
        # Of the kinds of attention only the one in plain arithmetic has second derivatives.
        # Modules may stand in several places, but no two share a tensor (convert_batchnorm), so nothing is tied.
        try:
            with _uncached_autocast(), sdpa_kernel(SDPBackend.MATH):
                outputs = functional_call(self.module, state, (inputs,), tie_weights=False)
        finally:
            for layer in self._layers:
                layer.differentiable_statistics, layer.shards = False, None
        return outputs, {name: state[name] for name in buffers}

    def takes_autograd(self, *tensors: Any) -> bool:
        """Whether `torch.autograd` takes derivatives at `tensors`, any structures of them, and not `torch.func`."""
        if not self.alone or self.compiled is not None or torch.is_inference_mode_enabled():
            return False
        # Which cannot look back on tensors that were made in inference mode.
        return not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in pytree.tree_leaves(tensors))

    @contextmanager
    def first_order(self) -> Iterator[None]:
        """While training mode is differentiated once, by parameters alone and by `torch.autograd`."""
        for layer in self._layers:
            layer.first_order = self.fused_batchnorm
        try:
            yield
        finally:
            for layer in self._layers:
                layer.first_order = False

    def _mixed(self, tensor_name: str) -> bool:
        return tensor_name.rpartition(".")[0] in self.batchnorm_names

    def _shared(self, parameters: Tensors, inputs: Tensor, *, training: bool) -> Tensors:
        """Prepares for a batch of which this process has a part; mixed batch norms see to their own tensors."""
        shards = Shards.of(self.group, len(inputs)) if training else Shards(self.group, 0)
        for layer in self._layers:
            layer.shards = shards
        others = [name for name in parameters if not self._mixed(name)]
        if not others:
            return parameters
        return {**parameters, **dict(zip(others, shards.to_shards(*(parameters[n] for n in others)), strict=True))}

    def loss(
        self, parameters: Tensors, buffers: Tensors, beta: Tensor, batch: Batch, *, training: bool
    ) -> tuple[Tensor, Tensors]:
        """The mean loss over a batch, and the buffers afterwards; arguments as in `__call__`."""
        inputs, targets = batch
        outputs, buffers = self(parameters, buffers, beta, inputs, training=training)
        return self.mean_over_samples(self.loss_fn, outputs, targets), buffers

    def mean_over_samples(self, loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
        """A mean loss, over the parts of all processes where they share the batch."""
        if self.group is None:
            return loss_fn(outputs, targets)
        shards = Shards.of(self.group, len(targets))
        # A process can be without samples; the mean over none would be NaN.
        own = loss_fn(outputs, targets) * (len(targets) / shards.total) if len(targets) else 0.0 * outputs.sum()
        return shards.from_shards(own)[0]


@contextmanager
def recorded() -> Iterator[None]:
    """While `torch.autograd` records; what it would compute again in its backward pass is refused.

    That would be computed at the module's own tensors, which `functional_call` has put back by then.
    """
    reason = "activation checkpointing (and other hooks on saved tensors) does not work here; switch it off"
    with torch.enable_grad(), torch.autograd.graph.disable_saved_tensors_hooks(reason):
        yield


def gradients_or_zeros(value: Tensor, leaves: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """`torch.autograd.grad`, with zeros for leaves that do not reach the value."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(value, leaves, create_graph=create_graph, materialize_grads=True))
