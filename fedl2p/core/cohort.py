"""A cohort: clients whose tensors have equal shapes, stacked so that `torch.vmap` passes them through together."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedl2p.core.functional import FunctionalModel, Inputs, arguments_of

# Measured on 2 CPU cores: stacking pays as long as one pass of the whole cohort stays within about this many values
# (16 MB of them); beyond, the stacked convolutions are no faster, then slower, than one client after the other.
CPU_COHORT_VALUES = 6_000_000
MAX_CLIENTS = 64
GPU_MEMORY_SHARE = 0.5
_PASSES = 6  # of a client's activations in memory at once: forward, backward, and the tangents of both


def activations(model: FunctionalModel, inputs: Inputs) -> int:
    """How many values the layers of `model` put out for a batch's inputs in one forward pass."""
    count = 0

    def add(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal count
        count += sum(leaf.numel() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))

    leaves = [module for module in model.module.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(add) for module in leaves]
    args, kwargs = arguments_of(inputs)
    try:
        with torch.no_grad():
            model.module.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return count


def automatic_cohort_size(model: FunctionalModel, inputs: Inputs, *, history: int) -> int:
    """How many clients to stack, by shapes and device alone, so that a run repeats.

    Args:
        model: the model.
        inputs: of a training batch.
        history: states of the inner loop that the estimator keeps (each holds all parameters).

    Returns:
        1 to 64. On a CPU as many as keep a pass within `CPU_COHORT_VALUES` activations; on a GPU, whose rule is not
        measured but by memory, as many as fill half of it.
    """
    values = activations(model, inputs)
    device = next(leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    if device.type != "cuda":
        return max(1, min(MAX_CLIENTS, CPU_COHORT_VALUES // max(values, 1)))
    parameters = sum(p.numel() for p in model.module.parameters())
    client_bytes = 4 * (_PASSES * values + (history + _PASSES) * parameters)
    budget = GPU_MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    return max(1, min(MAX_CLIENTS, int(budget // client_bytes)))


def groups(clients: Sequence[Any], max_size: int | None = None) -> Iterator[list[int]]:
    """Positions of clients whose tensors have equal shapes, at most `max_size` (None: all) together, in a fixed order.

    Args:
        clients: a structure of tensors each, usually an `Episode`.
        max_size: at least 1, or None.
    """
    by_shape: dict[Any, list[int]] = {}
    for position, client in enumerate(clients):
        leaves, structure = pytree.tree_flatten(client)
        by_shape.setdefault((str(structure), tuple(leaf.shape for leaf in leaves)), []).append(position)
    for positions in by_shape.values():
        size = max_size or len(positions)
        for start in range(0, len(positions), size):
            yield positions[start : start + size]


def stack(structures: Sequence[Any]) -> Any:
    """Stacks equal structures of tensors along a new first dimension; a cohort's episode from its clients'."""
    flat = [pytree.tree_flatten(structure) for structure in structures]
    return pytree.tree_unflatten(
        [torch.stack(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1]
    )


def take(structure: Any, index: int) -> Any:
    """The entry `index` of a stacked structure."""
    return pytree.tree_map(lambda leaf: leaf[index], structure)
