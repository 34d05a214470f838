"""The inner loop: fine-tuning as functions of (parameters, buffers, batches, hyperparameters) that return new ones.

Nothing here holds state or changes a tensor that the caller holds, so one function serves one client or, under
`torch.vmap`, a cohort of clients.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedl2p.core.differentiation import FUNC_TRANSFORMS, Differentiation
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, Tensors, concatenate
from fedl2p.core.settings import BatchNormMode, RunningStart, word
from fedl2p.core.statistics import ClientStatistics
from fedl2p.errors import ModelError


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
    model: FunctionalModel,
    buffers: Tensors,
    client_statistics: ClientStatistics,
    *,
    start: RunningStart = RunningStart.measured,
) -> Tensors:
    """The running statistics that a client's fine-tuning starts from.

    Args:
        model: the model.
        buffers: the global model's buffers.
        client_statistics: of the client's training data.
        start: see `RunningStart`.

    Returns:
        The buffers that take the place of the global model's, by name.

    Raises:
        ConfigError: an unknown `start`.
        ModelError: the statistics are of another model.
    """
    start = word(RunningStart, start, "running_start")
    channels = [(name, buffers[f"{name}.running_mean"].shape) for name in model.batchnorm_names]
    if [(name, mean.shape) for name, mean in client_statistics.channel_mean.items()] != channels:
        raise ModelError("The statistics were collected with another model: their batch-norm layers differ.")
    result: Tensors = {}
    for name in model.batchnorm_names:
        mean, var = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
        if start is RunningStart.measured:
            result[f"{name}.running_mean"] = client_statistics.channel_mean[name].to(mean)
            result[f"{name}.running_var"] = client_statistics.channel_var[name].to(var)
        else:
            result[f"{name}.running_mean"] = torch.zeros_like(mean)
            result[f"{name}.running_var"] = torch.ones_like(var)
            if f"{name}.num_batches_tracked" in buffers:
                result[f"{name}.num_batches_tracked"] = torch.zeros_like(buffers[f"{name}.num_batches_tracked"])
    return result


def active_parameters(model: FunctionalModel, eta: Tensor) -> tuple[str, ...]:
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
    active: Sequence[str] | None = None,
    differentiation: Differentiation = FUNC_TRANSFORMS,
) -> FineTuned:
    """The inner loop (line 9 of Algorithm 1): one SGD step a batch; no graph is kept.

    Args:
        model: the model.
        state: theta_g, with the client's `initial_running` among the buffers.
        batches: one a step, of any length including 0.
        beta: shape (B,).
        eta: shape (P,).
        history: how many of the last states to keep for a hypergradient.
        active: names of the tensors to move (see `active_parameters`); None moves all. Those left out must have eta 0.
        differentiation: how gradients are taken.

    Returns:
        The final state, the kept history and the training losses.
    """
    beta, eta = beta.detach(), eta.detach()
    rates = dict(zip(model.parameter_names, eta.unbind(-1), strict=True))
    if active is not None:
        rates = {name: rates[name] for name in active}
    kept: list[InnerState] = []
    losses: list[Tensor] = []
    for number, batch in enumerate(batches):
        if number >= len(batches) - history:
            kept.append(state)
        state, loss = differentiation.inner_step(model, state, batch, beta, rates)
        losses.append(loss)
    return FineTuned(state, tuple(kept), torch.stack(losses) if losses else beta.new_zeros(0))


def evaluation_batches(batches: Sequence[Batch], bn_mode: BatchNormMode) -> list[Batch]:
    """The batches that evaluation runs on: as they are, or all as one where their own statistics count."""
    if bn_mode == BatchNormMode.running or len(batches) < 2:
        return list(batches)
    return [concatenate(batches)]


def evaluation_loss(
    model: FunctionalModel,
    state: InnerState,
    beta: Tensor,
    batches: Sequence[Batch],
    *,
    bn_mode: BatchNormMode = BatchNormMode.running,
) -> Tensor:
    """L_V: the mean validation loss over all samples of `batches` in evaluation mode, 0-d.

    Args:
        model: the model.
        state: parameters and buffers.
        beta: shape (B,).
        batches: (inputs, targets) of the whole set.
        bn_mode: what beta mixes with the pretrained statistics.
    """
    batches = evaluation_batches(batches, bn_mode)
    counts = [model.count_samples(batch) for batch in batches]
    terms = []
    for (inputs, targets), count in zip(batches, counts, strict=True):
        outputs = predict(model, state, beta, inputs, bn_mode=bn_mode)
        terms.append(model.mean_over_samples(model.val_loss_fn, outputs, targets) * (count / sum(counts)))
    return torch.stack(terms).sum()


def predict(
    model: FunctionalModel,
    state: InnerState,
    beta: Tensor,
    inputs: Any,
    *,
    bn_mode: BatchNormMode = BatchNormMode.running,
) -> Any:
    """The model's outputs for a batch's inputs in evaluation mode; arguments as in `evaluation_loss`."""
    own = bn_mode == BatchNormMode.batch
    return model(state.parameters, state.buffers, beta, inputs, training=False, batch_statistics=own)[0]


def evaluate(
    model: FunctionalModel,
    state: InnerState,
    beta: Tensor,
    batches: Sequence[Batch],
    *,
    bn_mode: BatchNormMode = BatchNormMode.running,
) -> tuple[Any, Tensor, Tensor]:
    """Outputs and losses of a personalized model; arguments as in `evaluation_loss`.

    Returns:
        The outputs of all samples, in order, their mean loss (`loss_fn`) and validation loss (`val_loss_fn`), 0-d.
    """
    parts = [predict(model, state, beta, inputs, bn_mode=bn_mode) for inputs, _ in evaluation_batches(batches, bn_mode)]
    outputs = concatenate(parts) if len(parts) > 1 else parts[0]
    targets = concatenate([targets for _, targets in batches])
    return outputs, model.loss_fn(outputs, targets), model.val_loss_fn(outputs, targets)


def to_model(batches: Sequence[Batch], module: nn.Module) -> list[Batch]:
    """The batches on the device of a module, with its floating-point type."""
    reference = next(module.parameters(), torch.zeros(()))

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(reference) if tensor.is_floating_point() else tensor.to(reference.device)

    def placed(batch: Batch) -> Batch:
        inputs, targets = batch
        return pytree.tree_map_only(Tensor, place, inputs), pytree.tree_map_only(Tensor, place, targets)

    return [placed(batch) for batch in batches]
