"""How derivatives of a model are taken: by the transforms of `torch.func`, or by `torch.autograd`.

Both give the same numbers. `FuncTransforms` works everywhere, under `torch.vmap` too. `Autograd` is faster for one
client outside of all transforms.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, jvp, vjp
from torch.utils import _pytree as pytree

from fedl2p.core.convolution import TwiceDifferentiableConvolutions
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, Tensors, ordinary, split_running

Objective = Callable[..., tuple[Tensor, Tensors]]
"""(parameters by name, ...) -> a loss (0-d), and other tensors by name."""

HALF_SCALE = 1024.0  # a power of two, so that scaling rounds nothing

with warnings.catch_warnings(), forward_ad.dual_level():
    # At its first use torch scripts the rules of forward mode, and warns its users that scripting is deprecated.
    warnings.simplefilter("ignore", FutureWarning)
    forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class StepBack(NamedTuple):
    """What one inner step hands back to the state before it, see `Differentiation.step_back`.

    Attributes:
        gradient: of the training loss by every parameter, as the step used it.
        parameters: what comes back to the parameters before the step, beside the identity.
        running: what comes back to the running statistics before the step.
        beta: what comes back to beta, shape (B,).
    """

    gradient: Tensors
    parameters: Tensors
    running: Tensors
    beta: Tensor


class Differentiation(ABC):
    """A way to take derivatives of a `FunctionalModel`.

    Attributes:
        fused_batchnorm: whether inner steps take batch norms in PyTorch's kernels.
    """

    fused_batchnorm: bool = False

    def prepare(self, tensors: Any) -> Any:
        """A structure of tensors in a form that can be differentiated this way."""
        return tensors

    @abstractmethod
    def gradient(self, objective: Objective, parameters: Tensors) -> tuple[Tensors, Tensor, Tensors]:
        """The gradient of a loss by the parameters, the loss (0-d), and the objective's other tensors; no graph."""

    @abstractmethod
    def grad_and_vjp(
        self, objective: Objective, *primals: Any
    ) -> tuple[tuple[Tensors, Tensors], Callable[[tuple[Tensors, Tensors]], tuple[Any, ...]]]:
        """The gradient of a loss, and what pulls vectors back through it: reverse mode over reverse mode.

        Args:
            objective: (*primals) -> loss, and other tensors by name.
            *primals: parameters by name, then any structures of floating-point tensors.

        Returns:
            The gradient by the parameters and the other tensors, and a function from a vector for each of the two to
            one for each of the primals. It may be called often: the graph is kept.
        """

    @abstractmethod
    def step_back(
        self,
        model: FunctionalModel,
        state: InnerState,
        batch: Batch,
        beta: Tensor,
        direction: Tensors,
        running_adjoint: Tensors,
    ) -> StepBack:
        """Pulls adjoints back through (g, R), the gradient of an inner step's loss and its new running statistics.

        Args:
            model: the model.
            state: before the step.
            batch: of the step.
            beta: shape (B,).
            direction: the vector for g, by parameter name.
            running_adjoint: the vector for R, by buffer name.
        """

    def inner_step(
        self, model: FunctionalModel, state: InnerState, batch: Batch, beta: Tensor, rates: Tensors
    ) -> tuple[InnerState, Tensor]:
        """One SGD step with a rate for each tensor; theta - eta * gradient.

        Args:
            model: the model.
            state: where to start.
            batch: inputs and targets.
            beta: shape (B,).
            rates: 0-d rates by parameter name; a parameter without one is left alone and costs no gradient.

        Returns:
            The new state, and the training loss before the step (0-d).
        """
        state, batch, beta = self.prepare((state, batch, beta))
        frozen = {name: p for name, p in state.parameters.items() if name not in rates}
        trained = {name: state.parameters[name] for name in rates}
        scale = gradient_scale(beta.device.type)

        def loss(trained: Tensors) -> tuple[Tensor, Tensors]:
            parameters = {**frozen, **trained}
            value, buffers = model.loss(
                parameters, state.buffers, beta, batch, training=True, fused=bool(trained) and self.fused_batchnorm
            )
            return value if scale == 1.0 else value * scale, buffers

        gradients: Tensors
        if trained:
            gradients, value, buffers = self.gradient(loss, trained)
        else:
            gradients, (value, buffers) = {}, loss(trained)
        if scale != 1.0:
            value, gradients = value / scale, {name: g / scale for name, g in gradients.items()}
        moved = {
            name: torch.addcmul(p, rates[name].to(p.dtype), gradients[name].to(p.dtype), value=-1)
            for name, p in trained.items()
        }
        # The model's own order of parameters is kept.
        return InnerState({name: moved.get(name, p) for name, p in state.parameters.items()}, buffers), value


def gradient_scale(device_type: str) -> float:
    """What the training loss is multiplied by while it is differentiated: small gradients vanish in half precision."""
    half = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    return HALF_SCALE if half else 1.0


class FuncTransforms(Differentiation):
    """By the transforms of `torch.func`, which may stand inside of `torch.vmap`."""

    def gradient(self, objective: Objective, parameters: Tensors) -> tuple[Tensors, Tensor, Tensors]:
        """See `Differentiation`."""
        gradients, (value, others) = grad_and_value(objective, has_aux=True)(parameters)
        return gradients, value, others

    def grad_and_vjp(
        self, objective: Objective, *primals: Any
    ) -> tuple[tuple[Tensors, Tensors], Callable[[tuple[Tensors, Tensors]], tuple[Any, ...]]]:
        """See `Differentiation`."""
        values, pull_back = vjp(grad(objective, has_aux=True), *primals)[:2]
        return values, pull_back

    def step_back(
        self,
        model: FunctionalModel,
        state: InnerState,
        batch: Batch,
        beta: Tensor,
        direction: Tensors,
        running_adjoint: Tensors,
    ) -> StepBack:
        """Forward mode over reverse mode: second derivatives are symmetric.

        With G(theta, r, beta, s) the gradient of L + s (c . R) by its first three arguments, c the `running_adjoint`,
        the derivative of G at s = 0 in the direction (d, 0, 0, 1) is all three results at once, and its value holds g:
        one `jvp` of `grad`, and no graph of activations.
        """
        running, fixed = split_running(state.buffers)
        inputs, targets = batch
        leaves, structure = pytree.tree_flatten(targets)
        # What a zero tangent is cheaper for than none, which forward mode treats slowly, or not at all in a loss.
        constants = (
            {name: b for name, b in fixed.items() if b.is_floating_point()},
            {index: leaf for index, leaf in enumerate(leaves) if leaf.is_floating_point()},
        )

        def gradients(
            parameters: Tensors, running: Tensors, beta: Tensor, share: Tensor, weights: Tensors, constants: Any
        ) -> tuple[Tensors, Tensors, Tensor]:
            def objective(parameters: Tensors, running: Tensors, beta: Tensor) -> Tensor:
                buffers = {**fixed, **constants[0], **running}
                known = [constants[1].get(index, leaf) for index, leaf in enumerate(leaves)]
                whole = inputs, pytree.tree_unflatten(known, structure)
                loss, after = model.loss(parameters, buffers, beta, whole, training=True)
                if weights:
                    loss = loss + share * torch.cat([weight * after[name] for name, weight in weights.items()]).sum()
                return loss

            return grad(objective, argnums=(0, 1, 2))(parameters, running, beta)

        share = torch.zeros_like(beta.sum())
        point = (state.parameters, running, beta, share, running_adjoint, constants)
        still = pytree.tree_map(torch.zeros_like, point)
        tangents = (direction, *still[1:3], torch.ones_like(share), *still[4:])
        (gradient, _, _), back = jvp(gradients, point, tangents)[:2]
        return StepBack(gradient, *back)


class CompiledSteps(FuncTransforms):
    """`FuncTransforms` with inner steps compiled by torch at the first use of each shape.

    Steps that torch cannot compile run as they are. Compiling takes a minute or more a shape; on a CPU `Autograd` is
    faster (docs/speed.md). Under `torch.vmap` torch runs the step as it is. Clients of equal shapes should share one of
    these.
    """

    def __init__(self) -> None:
        """Prepares; nothing is compiled yet."""
        self._step: Callable[..., tuple[InnerState, Tensor]] = torch.compile(super().inner_step, dynamic=False)

    def __reduce__(self) -> tuple[type["CompiledSteps"], tuple[()]]:
        """A copy, in memory or pickled, compiles anew: compiled code cannot travel."""
        return CompiledSteps, ()

    def inner_step(
        self, model: FunctionalModel, state: InnerState, batch: Batch, beta: Tensor, rates: Tensors
    ) -> tuple[InnerState, Tensor]:
        """See `Differentiation`."""
        try:
            return self._step(model, state, batch, beta, rates)
        except RuntimeError as error:  # the base of whatever torch's compilers raise
            done = super().inner_step(model, state, batch, beta, rates)  # raises what is not the compiler's fault
            self._step = super().inner_step
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"torch cannot compile the inner step, and goes on without: {reason}", stacklevel=2)
            return done


@dataclass(frozen=True)
class Autograd(Differentiation):
    """By `torch.autograd`: for one client, outside of the transforms of `torch.func`.

    Attributes:
        fused_batchnorm: whether inner steps take batch norms in PyTorch's kernels: faster for large networks, and with
            a rounding of their own.
    """

    fused_batchnorm: bool = False

    def prepare(self, tensors: Any) -> Any:
        """Copies of tensors that were made in inference mode, on which autograd cannot look back; the others stay."""
        return ordinary(tensors)

    def gradient(self, objective: Objective, parameters: Tensors) -> tuple[Tensors, Tensor, Tensors]:
        """See `Differentiation`."""
        with _recorded():
            leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
            value, others = objective(leaves)
            gradients = _gradients_or_zeros(value, list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True)), value.detach(), _detached(others)

    def grad_and_vjp(
        self, objective: Objective, *primals: Any
    ) -> tuple[tuple[Tensors, Tensors], Callable[[tuple[Tensors, Tensors]], tuple[Any, ...]]]:
        """See `Differentiation`."""
        flat, structure = pytree.tree_flatten(primals)
        with _recorded(), TwiceDifferentiableConvolutions():
            leaves = [leaf.detach().requires_grad_() for leaf in flat]
            moved = pytree.tree_unflatten(leaves, structure)
            loss, others = objective(*moved)
            found = _gradients_or_zeros(loss, list(moved[0].values()), create_graph=True)
        gradient = dict(zip(moved[0], found, strict=True))

        def pull_back(vectors: tuple[Tensors, Tensors]) -> tuple[Any, ...]:
            pairs = [(g, vectors[0][n]) for n, g in gradient.items()] + [(o, vectors[1][n]) for n, o in others.items()]
            pairs = [(output, vector) for output, vector in pairs if output.requires_grad]
            pulled = [torch.zeros_like(leaf) for leaf in leaves]  # where all is constant
            if pairs:
                outputs, directions = zip(*pairs, strict=True)
                with torch.inference_mode(False):
                    pulled = list(
                        torch.autograd.grad(outputs, leaves, directions, retain_graph=True, materialize_grads=True)
                    )
            result: tuple[Any, ...] = pytree.tree_unflatten(pulled, structure)
            return result

        return (_detached(gradient), _detached(others)), pull_back

    def step_back(
        self,
        model: FunctionalModel,
        state: InnerState,
        batch: Batch,
        beta: Tensor,
        direction: Tensors,
        running_adjoint: Tensors,
    ) -> StepBack:
        """Reverse mode over reverse mode, faster for one client alone, whose graph lives as long as the step."""
        state, batch, beta, direction, running_adjoint = self.prepare((state, batch, beta, direction, running_adjoint))
        running, fixed = split_running(state.buffers)

        def step(parameters: Tensors, running: Tensors, beta: Tensor) -> tuple[Tensor, Tensors]:
            loss, after = model.loss(parameters, {**fixed, **running}, beta, batch, training=True)
            return loss, {name: after[name] for name in running_adjoint}

        (gradient, _), pull_back = self.grad_and_vjp(step, state.parameters, running, beta)
        return StepBack(gradient, *pull_back((direction, running_adjoint)))


@contextmanager
def _recorded() -> Iterator[None]:
    """While `torch.autograd` records; what it would compute again in its backward pass is refused.

    That would be computed at the module's own tensors, which `functional_call` has put back by then.
    """
    reason = "activation checkpointing (and other hooks on saved tensors) does not work here; switch it off"
    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.disable_saved_tensors_hooks(reason):
        yield


def _gradients_or_zeros(value: Tensor, leaves: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """`torch.autograd.grad`, with zeros for leaves that do not reach the value."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(value, leaves, create_graph=create_graph, materialize_grads=True))


def _detached(tensors: Tensors) -> Tensors:
    return {name: tensor.detach() for name, tensor in tensors.items()}


FUNC_TRANSFORMS = FuncTransforms()
