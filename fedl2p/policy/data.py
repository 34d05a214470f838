"""A new client's data, looked at before anything is learned from them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedl2p.core.finetune import predict, to_model
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, batch_size
from fedl2p.errors import DataError, ModelError


def read_batches(
    model: FunctionalModel, loader: Iterable[Any], *, what: str, input_shape: tuple[int, ...] | None = None
) -> list[Batch]:
    """One pass over a loader: its batches, checked, on the model's device and of its floating-point type.

    Args:
        model: the model.
        loader: of (inputs, targets).
        what: the data are, for the error.
        input_shape: of one sample, where the inputs are one tensor; None takes any that the model takes.

    Raises:
        DataError: there is no batch, a batch is no pair, inputs have values that are not finite or a shape of their
            own, the model does not take them, or a label is no class of the model.
    """
    batches: list[Batch] = []
    for number, batch in enumerate(loader):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DataError(f"Batch {number} of the {what} data is no pair of inputs and targets.")
        _check_inputs(f"Batch {number} of the {what} data", batch[0], batches[0][0] if batches else None, input_shape)
        batches += to_model([(batch[0], batch[1])], model.module)
    if not batches:
        raise DataError(f"There are no {what} data: the loader gave no batch.")
    outputs = _outputs(model, batches[0][0], what)
    for number, (_, targets) in enumerate(batches):
        _check_labels(f"Batch {number} of the {what} data", targets, outputs)
    return batches


def _check_inputs(where: str, inputs: Any, first: Any, input_shape: tuple[int, ...] | None) -> None:
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not leaves or any(len(leaf) == 0 for leaf in leaves):
        raise DataError(f"{where} has no samples; inputs are a tensor, or a tuple or dict of tensors.")
    if any(leaf.is_floating_point() and not torch.isfinite(leaf).all() for leaf in leaves):
        raise DataError(f"{where} has inputs with values that are NaN or infinite.")
    shapes = [tuple(leaf.shape[1:]) for leaf in leaves]
    if isinstance(inputs, Tensor) and input_shape is not None and shapes[0] != input_shape:
        raise DataError(f"{where} has inputs of shape {shapes[0]}; the policy was learned with {input_shape}.")
    if first is not None:
        before = [tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(first) if isinstance(leaf, Tensor)]
        if shapes != before:
            raise DataError(f"{where} has inputs of shape {shapes}; those of the batches before it are {before}.")


def _outputs(model: FunctionalModel, inputs: Any, what: str) -> Any:
    """What the global model answers to the first samples."""
    few = pytree.tree_map_only(Tensor, lambda tensor: tensor[:2], inputs)
    reference = next(model.module.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            beta = reference.new_zeros(len(model.batchnorm_names))
            return predict(model, InnerState(*model.tensors()), beta, few)
    except (RuntimeError, TypeError, ValueError, IndexError, ModelError) as error:
        shapes = pytree.tree_map_only(Tensor, lambda tensor: tuple(tensor.shape[1:]), inputs)
        raise DataError(f"The model does not take the {what} data, inputs of shape {shapes}: {error}") from error


def _check_labels(where: str, targets: Any, outputs: Any) -> None:
    """Class numbers, where the model answers with a number for each class."""
    classes = isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.dim() == 1
    if not (classes and isinstance(outputs, Tensor) and outputs.dim() == 2):
        return
    outside = targets[(targets < 0) | (targets >= outputs.shape[1])]
    if len(outside):
        raise DataError(
            f"{where} has the label {int(outside[0])}; the model has the classes 0 to {outputs.shape[1] - 1}."
        )


def require_two_samples(batches: list[Batch]) -> None:
    """Refuses training data that have no spread.

    Raises:
        DataError: there is one sample alone.
    """
    count = sum(batch_size(inputs) for inputs, _ in batches)
    if count < 2:
        raise DataError("The training data are one sample; at least two are needed, since one has no variance.")
