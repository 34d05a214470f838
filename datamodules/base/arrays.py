"""Samples that stay in one array, which clients share, and become inputs a batch at a time.

Images are kept as bytes, a quarter of their size as floats; a batch is cut out, normalized and augmented by tensor
operations on the device that holds the array, so no worker process is needed and no client has a copy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedl2p.errors import DataError

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""From inputs (n, ...) to inputs of the same shape, random through the generator alone."""


class Arrays:
    """All samples of a data set, and how a batch of them becomes inputs.

    Bytes are scaled to [0, 1]; then the mean is taken off and the deviation divided by, channel by channel.

    Attributes:
        inputs: Shape (N, channels, ...), uint8 or floating point.
        labels: Shape (N,), int64.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: ArrayLike | Tensor,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Keeps the arrays, without a copy where the types fit.

        Args:
            inputs: As the attribute.
            labels: Class numbers, shape (N,).
            mean: One number a channel, in units of the scaled inputs; None is 0.
            std: One number a channel, above 0; None is 1.

        Raises:
            DataError: If lengths differ, or mean or std do not fit the channels.
        """
        self.inputs = inputs
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        if self.labels.shape != (len(inputs),):
            raise DataError(f"There are {len(inputs)} inputs, but labels of shape {tuple(self.labels.shape)}.")
        self._mean = self._by_channel("mean", mean, 0.0)
        self._std = self._by_channel("std", std, 1.0)
        if not (self._std > 0).all():
            raise DataError(f"std is {list(std or ())}; every number must be above 0.")

    def _by_channel(self, name: str, values: Sequence[float] | None, default: float) -> Tensor:
        channels = self.inputs.shape[1]
        given = [default] * channels if values is None else [float(value) for value in values]
        if len(given) != channels:
            raise DataError(f"{name} has {len(given)} numbers; the inputs have {channels} channels.")
        return torch.tensor(given).reshape(-1, *[1] * (self.inputs.dim() - 2))

    @property
    def normalization(self) -> tuple[Tensor, Tensor]:
        """What is taken off each channel and what it is divided by, each of shape (channels, 1, ...)."""
        return self._mean, self._std

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (n, channels, ...), float32 and normalized, and labels (n,) of some rows, shape (n,)."""
        rows = rows.to(self.inputs.device)
        inputs = self.inputs[rows]
        scaled = inputs.to(torch.float32).div_(255) if inputs.dtype == torch.uint8 else inputs.to(torch.float32)
        return (scaled - self._mean) / self._std, self.labels[rows]

    def to(self, device: torch.device | str) -> None:
        """Moves the arrays, and with them all batches from now on, to a device."""
        self.inputs, self.labels = self.inputs.to(device), self.labels.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """Some rows of shared arrays: one client's training, validation or test set.

    An index gives one sample, ``(channels, ...)`` and a 0-d label; a list of indices gives a batch.

    Attributes:
        arrays: Shared with other data sets.
        rows: Which rows, shape (n,), int64.
        augmentation: Applied to batches of a data set from `augmented`; kept but not applied otherwise.
    """

    def __init__(
        self, arrays: Arrays, rows: ArrayLike | Tensor | None = None, *, augmentation: Augmentation | None = None
    ) -> None:
        """Takes rows of `arrays`, all of them if None.

        Raises:
            DataError: If a row is outside the arrays.
        """
        self.arrays = arrays
        self.rows = torch.arange(len(arrays.labels)) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        if len(self.rows) and not (int(self.rows.min()) >= 0 and int(self.rows.max()) < len(arrays.labels)):
            raise DataError(f"A row is outside the {len(arrays.labels)} samples of the arrays.")
        self.augmentation = augmentation
        self._generator: torch.Generator | None = None

    def augmented(self, generator: torch.Generator) -> "ArrayDataset":
        """The same rows, whose batches are augmented; random through `generator`, a CPU one."""
        result = ArrayDataset(self.arrays, self.rows, augmentation=self.augmentation)
        result._generator = generator
        return result

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.rows)

    def __getitem__(self, index: int | list[int]) -> tuple[Tensor, Tensor]:
        """One sample, or the batch of a list of positions."""
        single = not isinstance(index, list)
        inputs, labels = self.arrays.batch(self.rows[[index] if single else index])
        if self.augmentation is not None and self._generator is not None:
            inputs = self.augmentation(inputs, self._generator)
        return (inputs[0], labels[0]) if single else (inputs, labels)


def labels_of(dataset: Dataset[Any]) -> NDArray[np.int64]:
    """The labels of a map-style data set, shape (n,); read sample by sample where there is no shorter way."""
    if isinstance(dataset, ArrayDataset):
        return dataset.arrays.labels.cpu()[dataset.rows].numpy()
    if type(dataset) is TensorDataset:
        return dataset.tensors[1].numpy().astype(np.int64)
    return np.array([int(dataset[i][1]) for i in range(len(dataset))], dtype=np.int64)  # type: ignore[arg-type]  # a Dataset with len


def crop_and_flip(inputs: Tensor, generator: torch.Generator, *, padding: int = 4) -> Tensor:
    """Moves every image by up to `padding` pixels each way, with zeros behind, and mirrors every second one.

    The usual augmentation of CIFAR-10; with one draw for each image.

    Args:
        inputs: Shape (n, channels, height, width).
        generator: Source of randomness, a CPU one.
        padding: Largest shift in pixels.
    """
    count, _, height, width = inputs.shape
    device = inputs.device
    down, right = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator).to(device)
    mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
    ys = down + torch.arange(height, device=device)
    xs = right + torch.arange(width, device=device)
    xs = torch.where(mirrored, xs.flip(1), xs)
    padded = torch.nn.functional.pad(inputs, (padding,) * 4)
    each = torch.arange(count, device=device)[:, None, None, None]
    channels = torch.arange(inputs.shape[1], device=device)[None, :, None, None]
    return padded[each, channels, ys[:, None, :, None], xs[:, None, None, :]]
