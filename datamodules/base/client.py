"""One client: who it is, what it has, and its data as a LightningDataModule."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from fedl2p.datamodules.base.arrays import ArrayDataset
from fedl2p.datamodules.base.split import check_count


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientData:
    """Who one client is and what it has.

    Attributes:
        name: Unique over the federation, such as ``seen-blur-03``.
        pool: One of `POOLS`.
        domain: What kind of data this is; clients of one domain resemble each other.
        train: Map-style data set of ``(x, y)``: a float tensor and a class number (int or 0-d tensor). Of an
            `ArrayDataset` the training batches are augmented, those of statistics are not.
        val: As `train`; the meta-learning loss is measured here.
        test: As `train`; used for reports alone.
        details: Numbers that a report may show, such as ``{"severity": 0.4}``.
    """

    name: str
    pool: str
    domain: str = "all"
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    details: Mapping[str, float] = field(default_factory=dict)


def num_samples(dataset: Dataset[Any]) -> int:
    """How many samples a map-style data set has."""
    return len(dataset)  # type: ignore[arg-type]  # whose class declares no length


class _BatchSampler(Sampler[list[int]]):
    """Lists of indices, a batch each; a last batch of one sample joins the batch before it.

    Every new iteration of a shuffled sampler gives another order; the sequence of orders depends on the seed
    alone.
    """

    def __init__(self, num_samples: int, batch_size: int, *, shuffle_seed: int | None = None) -> None:
        ends = [*range(batch_size, num_samples, batch_size), num_samples]
        # Batch norm has no statistics of one value, and dropping the sample would waste data.
        if len(ends) > 1 and batch_size > 1 and num_samples - ends[-2] == 1:
            del ends[-2]
        self._num_samples = num_samples
        self._bounds = list(zip([0, *ends], ends, strict=False))
        self._generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)

    def __iter__(self) -> Iterator[list[int]]:
        if self._generator is None:
            order = list(range(self._num_samples))
        else:
            order = torch.randperm(self._num_samples, generator=self._generator).tolist()
        return (order[start:end] for start, end in self._bounds)

    def __len__(self) -> int:
        return len(self._bounds)


def _loader(dataset: Dataset[Any], batch_size: int, shuffle_seed: int | None = None) -> DataLoader[Any]:
    batches = _BatchSampler(num_samples(dataset), batch_size, shuffle_seed=shuffle_seed)
    # A loader without a generator of its own draws from the global one at each iteration.
    generator = torch.Generator().manual_seed(shuffle_seed or 0)
    if shuffle_seed is not None and isinstance(dataset, ArrayDataset):
        dataset = dataset.augmented(torch.Generator().manual_seed(shuffle_seed))
    # Of tensor data sets only the class itself surely accepts a list of indices: a subclass may transform samples.
    if type(dataset) is TensorDataset or isinstance(dataset, ArrayDataset):
        return DataLoader(dataset, sampler=batches, batch_size=None, generator=generator)
    return DataLoader(dataset, batch_sampler=batches, generator=generator)


class ClientDataModule(L.LightningDataModule):
    """One client's data as ``Trainer.fit(client, datamodule=...)`` takes it.

    Batches are pairs ``(x, y)`` of shapes ``(n, *input_shape)`` and ``(n,)``. No batch has a single sample
    unless the data set has just one or the batch size is 1: such a last batch is merged into the one before.

    Args:
        client: The client.
        batch_size: Samples in a training batch, at least 1.
        seed: Fixes the order of the training samples; nothing else does. At least 0.
        evaluation_batch_size: Samples in every other batch, at least 1.

    Raises:
        DataError: If a batch size is below 1 or the seed is negative.
    """

    def __init__(self, client: ClientData, *, batch_size: int, seed: int = 0, evaluation_batch_size: int = 256) -> None:
        super().__init__()
        check_count("batch_size", batch_size, 1)
        check_count("evaluation_batch_size", evaluation_batch_size, 1)
        check_count("seed", seed, 0)
        self.client = client
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, shuffled anew by each iteration; every new loader starts from `seed` again."""
        return _loader(self.client.train, self.batch_size, self.seed)

    def statistics_dataloader(self) -> DataLoader[Any]:
        """The training set in its own order, in evaluation batches."""
        return _loader(self.client.train, self.evaluation_batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation set in its own order."""
        return _loader(self.client.val, self.evaluation_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test set in its own order."""
        return _loader(self.client.test, self.evaluation_batch_size)
