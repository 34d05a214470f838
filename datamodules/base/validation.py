"""What a client's samples must be like, looked at before anything is learned from them or written."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedl2p.datamodules.base.arrays import ArrayDataset
from fedl2p.errors import DataError
from fedl2p.pools import ROLES

if TYPE_CHECKING:
    from fedl2p.datamodules.base.federated import ClientData

MAX_SECONDS = 5.0
"""How long data sets that are read sample by sample are looked at; the first and last sample of each always are."""


def read_sample(client: "ClientData", role: str, position: int) -> tuple[Any, Any]:
    """One sample, whose errors name the client.

    Raises:
        DataError: If the data set fails, or gives no pair.
    """
    where = f"Client {client.name!r}: sample {position} of its {role} set"
    try:
        sample = getattr(client, role)[position]
    except Exception as error:  # a user's data set may raise anything
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
    if not (isinstance(sample, tuple | list) and len(sample) == 2):
        raise DataError(f"{where} is a {type(sample).__name__}; it must be a pair of an input and a class number.")
    return sample[0], sample[1]


def in_memory(dataset: Dataset[Any]) -> bool:
    """Whether a data set's tensors are at hand, all at once."""
    return isinstance(dataset, ArrayDataset) or type(dataset) is TensorDataset


def held_tensors(dataset: Dataset[Any]) -> tuple[Tensor, ...]:
    """The tensors of a data set that is `in_memory`: inputs (n, ...) and labels (n,); bytes as they are kept."""
    if isinstance(dataset, ArrayDataset):
        rows = dataset.rows.to(dataset.arrays.inputs.device)
        return dataset.arrays.inputs[rows], dataset.arrays.labels[rows]
    assert isinstance(dataset, TensorDataset)
    return dataset.tensors


def check_clients(clients: Sequence["ClientData"], num_classes: int) -> None:
    """Looks at the samples of all clients: all that are in memory, others for a few seconds.

    Args:
        clients: Whose sets have lengths above 0.
        num_classes: Labels are below this.

    Raises:
        DataError: Naming the client, if a sample cannot be read, inputs differ in shape, are of a wrong type or not
            finite in float32, or labels are no class numbers.
    """
    check = _Check(num_classes, clients[0])
    slow = []
    for client in clients:
        for role in ROLES:
            dataset = getattr(client, role)
            if in_memory(dataset):
                check.tensors(client, role)
            else:
                check.sample(client, role, 0)
                check.sample(client, role, len(dataset) - 1)
                slow += [(client, role, position) for position in range(1, len(dataset) - 1)]
    end = time.monotonic() + MAX_SECONDS
    for each in slow:
        if time.monotonic() > end:
            break
        check.sample(*each)


class _Check:
    """The rules, with the first client's first input as the model of all."""

    def __init__(self, num_classes: int, first: "ClientData") -> None:
        self.num_classes = num_classes
        self.first = first.name
        inputs = read_sample(first, ROLES[0], 0)[0]
        self.shape = tuple(np.shape(inputs)) if isinstance(inputs, Tensor | np.ndarray) else None

    def tensors(self, client: "ClientData", role: str) -> None:
        """All samples of a set that is in memory."""
        where = f"Client {client.name!r}: its {role} set"
        dataset = getattr(client, role)
        held = held_tensors(dataset)
        if len(held) != 2:
            raise DataError(f"{where} has {len(held)} tensors; it must have two, of inputs and class numbers.")
        inputs, labels = held
        if not (isinstance(dataset, ArrayDataset) and inputs.dtype == torch.uint8):
            self._inputs(where, inputs)
        elif tuple(inputs.shape[1:]) != self.shape:
            self._wrong_shape(where, inputs.shape[1:])
        self._labels(where, labels)

    def sample(self, client: "ClientData", role: str, position: int) -> None:
        """One sample of any set."""
        where = f"Client {client.name!r}: sample {position} of its {role} set"
        inputs, label = read_sample(client, role, position)
        self._any_inputs(where, inputs)
        self._labels(where, _one_label(label))

    def _any_inputs(self, where: str, inputs: Any) -> None:
        if isinstance(inputs, Mapping | tuple | list):
            for part in inputs.values() if isinstance(inputs, Mapping) else inputs:
                if isinstance(part, Tensor) and part.is_floating_point():
                    _check_finite(where, part[None])
        elif isinstance(inputs, Tensor) or (isinstance(inputs, np.ndarray) and inputs.dtype.kind in "biufc"):
            self._inputs(where, torch.as_tensor(inputs)[None])
        else:
            raise DataError(f"{where} has an input of type {type(inputs).__name__}; it must be a tensor.")

    def _inputs(self, where: str, inputs: Tensor) -> None:
        if not inputs.is_floating_point():
            raise DataError(f"{where} has inputs of type {inputs.dtype}; they must be floating point.")
        if tuple(inputs.shape[1:]) != self.shape:
            self._wrong_shape(where, inputs.shape[1:])
        _check_finite(where, inputs)

    def _wrong_shape(self, where: str, shape: Sequence[int]) -> None:
        raise DataError(
            f"{where} has inputs of shape {tuple(shape)}; the first input of client {self.first!r} has {self.shape}."
        )

    def _labels(self, where: str, labels: Tensor) -> None:
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise DataError(
                f"{where} has labels of type {labels.dtype}, each of shape {tuple(labels.shape[1:])}; a label must be "
                f"one whole number (int64) from 0 to {self.num_classes - 1}."
            )
        outside = (labels < 0) | (labels >= self.num_classes)
        if outside.any():
            raise DataError(f"{where} has the label {int(labels[outside][0])}; labels are 0 to {self.num_classes - 1}.")


def _one_label(label: Any) -> Tensor:
    try:
        return torch.as_tensor(label)[None]
    except (TypeError, ValueError, RuntimeError):
        return torch.full((1,), torch.nan)  # no number of any kind, which is refused as a broken one


def _check_finite(where: str, inputs: Tensor) -> None:
    finite = inputs.to(torch.float32).isfinite().flatten(1).all(dim=1)
    if not finite.all():
        which = f"the input {int((~finite).nonzero()[0])}" if len(inputs) > 1 else "an input"
        raise DataError(f"{where} has {which} with values that are NaN, infinite or too large for float32.")
