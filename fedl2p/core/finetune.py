"""The inner loop: fine-tuning as functions of (parameters, buffers, batches, hyperparameters) that return new ones.

Nothing here holds state or changes a tensor that the caller holds, so one function serves one client or, under
`torch.vmap`, a cohort of clients.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from fedl2p.core.distributed import total_count
from fedl2p.core.functional import Batch, FunctionalModel, Tensors, gradients_or_zeros, recorded
from fedl2p.core.statistics import ClientStatistics
from fedl2p.errors import ConfigError, ModelError

RunningStart = Literal["measured", "zero_one"]
EvaluationStatistics = Literal["running", "batch"]

HALF_SCALE = 1024.0  # a power of two, so that scaling rounds nothing


def _gradient_scale(device_type: str) -> float:
    """What the training loss is multiplied by while it is differentiated: small gradients vanish in half precision."""
    half = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    return HALF_SCALE if half else 1.0


class InnerState(NamedTuple):
    """Where fine-tuning stands: theta_i and the buffers (with the client's running statistics), by name."""

    parameters: Tensors
    buffers: Tensors


class FineTuned(NamedTuple):
    """What fine-tuning gives.

    Attributes:
        final: the state after the last step.
        history: the states before each of the last steps, as many as were asked for, oldest first.
        losses: the training loss before each step, shape (steps,).
    """

    final: InnerState
    history: tuple[InnerState, ...]
    losses: Tensor


def initial_running(
    model: FunctionalModel, buffers: Tensors, statistics: ClientStatistics, *, start: RunningStart = "measured"
) -> Tensors:
    """The running statistics that a client's fine-tuning starts from.

    Args:
        model: the model.
        buffers: the global model's buffers.
        statistics: the client's.
        start: `measured`: those of the client's training data in the pretrained model (exact where beta is 0, near
            elsewhere). `zero_one`: mean 0 and variance 1, as in the authors' code.

    Returns:
        The buffers that take the place of the global model's, by name.

    Raises:
        ConfigError: an unknown `start`.
        ModelError: the statistics are of another model.
    """
    if start not in ("measured", "zero_one"):
        raise ConfigError(f"The running statistics cannot start at '{start}'; allowed are 'measured' and 'zero_one'.")
    if tuple(statistics.channel_mean) != model.batchnorm_names:
        raise ModelError("The statistics were collected with another model: their batch-norm layers differ.")
    result: Tensors = {}
    for name in model.batchnorm_names:
        mean, var = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
        if start == "measured":
            result[f"{name}.running_mean"] = statistics.channel_mean[name].to(mean)
            result[f"{name}.running_var"] = statistics.channel_var[name].to(var)
        else:
            result[f"{name}.running_mean"] = torch.zeros_like(mean)
            result[f"{name}.running_var"] = torch.ones_like(var)
            if f"{name}.num_batches_tracked" in buffers:
                result[f"{name}.num_batches_tracked"] = torch.zeros_like(buffers[f"{name}.num_batches_tracked"])
    return result


def inner_step(
    model: FunctionalModel, state: InnerState, batch: Batch, beta: Tensor, rates: Tensors
) -> tuple[InnerState, Tensor]:
    """One SGD step with a rate for each tensor; theta - eta * gradient.

    Args:
        model: the model.
        state: where to start.
        batch: inputs and targets.
        beta: shape (B,).
        rates: 0-d rates by parameter name; a parameter without one is left alone and costs no gradient.

    Returns:
        The new state, and the training loss before the step.
    """
    frozen = {name: p for name, p in state.parameters.items() if name not in rates}
    scale = _gradient_scale(beta.device.type)

    def loss(trained: Tensors) -> tuple[Tensor, Tensors]:
        value, buffers = model.loss({**frozen, **trained}, state.buffers, beta, batch, training=True)
        return value if scale == 1.0 else value * scale, buffers

    trained = {name: state.parameters[name] for name in rates}
    gradients: Tensors
    if not trained:
        gradients, (value, buffers) = {}, loss(trained)
    elif model.takes_autograd(state, batch, beta):
        with model.first_order():
            gradients, (value, buffers) = _autograd(loss, trained)
    else:
        gradients, (value, buffers) = grad_and_value(loss, has_aux=True)(trained)
    if scale != 1.0:
        value, gradients = value / scale, {name: g / scale for name, g in gradients.items()}
    moved = {
        name: torch.addcmul(p, rates[name].to(p.dtype), gradients[name].to(p.dtype), value=-1)
        for name, p in trained.items()
    }
    # The model's own order of parameters is kept.
    return InnerState({name: moved.get(name, p) for name, p in state.parameters.items()}, buffers), value


def _autograd(
    loss: Callable[[Tensors], tuple[Tensor, Tensors]], trained: Tensors
) -> tuple[Tensors, tuple[Tensor, Tensors]]:
    """What `grad_and_value(loss, has_aux=True)` gives, without its price."""
    with recorded():
        leaves = {name: p.detach().requires_grad_() for name, p in trained.items()}
        value, buffers = loss(leaves)
        gradients = gradients_or_zeros(value, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True)), (value.detach(), {n: b.detach() for n, b in buffers.items()})


class CompiledStep:
    """`inner_step`, compiled by torch for each shape at its first use, or as it is where that cannot be done.

    Compiling takes a minute or more a shape; on a CPU the step of a client that goes alone is faster as it is
    (docs/speed.md). Under `torch.vmap` torch runs the step as it is.
    """

    def __init__(self) -> None:
        """Prepares; nothing is compiled yet."""
        self._step: Callable[..., tuple[InnerState, Tensor]] = torch.compile(inner_step, dynamic=False)

    def __call__(
        self, model: FunctionalModel, state: InnerState, batch: Batch, beta: Tensor, rates: Tensors
    ) -> tuple[InnerState, Tensor]:
        """See `inner_step`."""
        try:
            return self._step(model, state, batch, beta, rates)
        except RuntimeError as error:  # the base of whatever torch's compilers raise
            done = inner_step(model, state, batch, beta, rates)  # which raises what is not the compiler's fault
            self._step = inner_step
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"torch cannot compile the inner step, and goes on without: {reason}", stacklevel=2)
            return done


def trained_names(model: FunctionalModel, eta: Tensor) -> tuple[str, ...]:
    """Names of the tensors that fine-tuning moves: eta is not exactly 0, for any client of a cohort.

    Args:
        model: the model.
        eta: shape (P,) or (clients, P); its values are read, so call this outside `torch.vmap`.
    """
    moves = (eta != 0).reshape(-1, eta.shape[-1]).any(0).tolist()
    return tuple(name for name, moved in zip(model.parameter_names, moves, strict=True) if moved)


def finetune(
    model: FunctionalModel,
    state: InnerState,
    batches: Sequence[Batch],
    beta: Tensor,
    eta: Tensor,
    *,
    history: int = 0,
    trained: Sequence[str] | None = None,
) -> FineTuned:
    """The inner loop (line 9 of Algorithm 1): one SGD step a batch; no graph is kept.

    Args:
        model: the model.
        state: theta_g, with the client's `initial_running` among the buffers.
        batches: one a step, of any length including 0.
        beta: shape (B,).
        eta: shape (P,).
        history: how many of the last states to keep for a hypergradient.
        trained: names of the tensors to move (see `trained_names`); None moves all. Those left out must have eta 0.

    Returns:
        The final state, the kept history and the training losses.
    """
    beta, eta = beta.detach(), eta.detach()
    rates = dict(zip(model.parameter_names, eta.unbind(-1), strict=True))
    if trained is not None:
        rates = {name: rates[name] for name in trained}
    kept: list[InnerState] = []
    losses: list[Tensor] = []
    step = model.compiled or inner_step
    for number, batch in enumerate(batches):
        if number >= len(batches) - history:
            kept.append(state)
        state, loss = step(model, state, batch, beta, rates)
        losses.append(loss)
    return FineTuned(state, tuple(kept), torch.stack(losses) if losses else beta.new_zeros(0))


def evaluation_batches(batches: Sequence[Batch], statistics: EvaluationStatistics) -> list[Batch]:
    """The batches that evaluation runs on: as they are, or all as one where their own statistics count."""
    if statistics == "running" or len(batches) < 2:
        return list(batches)
    return [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]


def evaluation_loss(
    model: FunctionalModel,
    state: InnerState,
    beta: Tensor,
    batches: Sequence[Batch],
    *,
    statistics: EvaluationStatistics = "running",
) -> Tensor:
    """L_V: the mean validation loss over all samples of `batches` in evaluation mode, 0-d.

    Args:
        model: the model.
        state: parameters and buffers.
        beta: shape (B,).
        batches: the data.
        statistics: what beta mixes with the pretrained statistics: the client's `running` ones, or those of the whole
            data as one `batch` (as FT (BN I) tests).
    """
    batches = evaluation_batches(batches, statistics)
    counts = [total_count(len(targets), model.group) for _, targets in batches]
    terms = []
    for (inputs, targets), count in zip(batches, counts, strict=True):
        outputs, _ = model(
            state.parameters, state.buffers, beta, inputs, training=False, batch_statistics=statistics == "batch"
        )
        terms.append(model.mean_over_samples(model.val_loss_fn, outputs, targets) * (count / sum(counts)))
    return torch.stack(terms).sum()
