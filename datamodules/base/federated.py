"""One client's data as a LightningDataModule, and a federation of such clients in three pools."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from fedl2p.datamodules.base.arrays import ArrayDataset
from fedl2p.datamodules.base.fingerprint import client_hash, reads_a_set
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.base.validation import check_clients
from fedl2p.errors import DataError
from fedl2p.pools import POOLS, ROLES
from fedl2p.seeding import derive_seed, seeded_generators


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
    batches = _BatchSampler(_size(dataset), batch_size, shuffle_seed=shuffle_seed)
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
        _check_at_least(1, batch_size=batch_size, evaluation_batch_size=evaluation_batch_size)
        _check_at_least(0, seed=seed)
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


class FederatedDataModule(L.LightningDataModule, ABC):
    """Many clients in pools. A subclass sets `num_classes` and implements `build_clients`.

    It has no loaders of its own: ``federation.client(7)`` is the ordinary data module of client 7.

    Constructors hand on what they do not use by ``**options``; `inspect.signature` of a class names all that it takes.

    Args:
        batch_size: Samples in a client's training batch, at least 1.
        **split: Words of `Split` that are among `split_keys`: here the `seed` alone. Each is an attribute afterwards.

    Raises:
        DataError: If an argument is not known or below its limit.
    """

    num_classes: int
    classes: Sequence[str] = ()
    """Names of the classes by label; empty where they have none."""
    split: Split = Split()
    """How the data are divided: of a class, what holds where nothing else is given."""
    split_keys: tuple[str, ...] = ("seed",)
    """The words of `split` that may be given."""
    seed: int
    _clients: tuple[ClientData, ...] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Makes the signature of a class name what it hands on to the classes above it."""
        super().__init_subclass__(**options)
        cls.__signature__ = _full_signature(cls)  # type: ignore[attr-defined]  # which inspect looks for

    def __init__(self, *, batch_size: int = 32, **split: Any) -> None:
        super().__init__()
        _check_at_least(1, batch_size=batch_size)
        self.batch_size = batch_size
        unknown = [name for name in split if name not in self.split_keys]
        if unknown:
            known = ", ".join(inspect.signature(type(self)).parameters)
            raise DataError(f"{type(self).__name__} takes no {unknown[0]!r}; it takes {known}.")
        self.split = replace(self.split, **split)
        for name in self.split_keys:
            setattr(self, name, getattr(self.split, name))

    @abstractmethod
    def build_clients(self) -> Iterable[ClientData]:
        """Every client of the federation; a client's position is its id. Called once.

        The global generators of torch, NumPy and Python are seeded from `seed` meanwhile, so that data which are drawn
        from them are the same on each start.
        """

    def setup(self, stage: str | None = None) -> None:
        """Builds the clients at the first call and checks them.

        Args:
            stage: Ignored: all stages share the clients.

        Raises:
            DataError: If `num_classes` is not set, a name is used twice, a pool is unknown, there is no seen
                client, or a client's train, val or test set is empty or has no length.
        """
        if self._clients is None:
            if not hasattr(self, "num_classes"):
                raise DataError(f"{type(self).__name__} does not set num_classes; it must be a whole number.")
            with seeded_generators(derive_seed(self.seed, "clients")):
                clients = tuple(self.build_clients())
            _check_clients(clients)
            self._clients = clients

    @property
    def clients(self) -> tuple[ClientData, ...]:
        """All clients, by id; built at the first use."""
        self.setup()
        assert self._clients is not None
        return self._clients

    def pool(self, name: str) -> tuple[int, ...]:
        """The ids of one pool's clients, ascending.

        Raises:
            DataError: If there is no such pool.
        """
        if name not in POOLS:
            raise DataError(f"There is no pool {name!r}; the pools are {', '.join(POOLS)}.")
        return tuple(i for i, client in enumerate(self.clients) if client.pool == name)

    def client(self, client_id: int, *, seed: int = 0) -> ClientDataModule:
        """One client's data module.

        Args:
            client_id: Position in `clients`.
            seed: Of the order of the training samples.

        Raises:
            DataError: If there is no such client.
        """
        if not 0 <= client_id < len(self.clients):
            raise DataError(f"There is no client {client_id}; the ids go from 0 to {len(self.clients) - 1}.")
        return ClientDataModule(self.clients[client_id], batch_size=self.batch_size, seed=seed)

    def client_sizes(self, client_id: int) -> tuple[int, int, int]:
        """How many train, val and test samples a client has."""
        client = self.clients[client_id]
        return _size(client.train), _size(client.val), _size(client.test)

    def check(self) -> None:
        """Looks at the samples before they are used: all that are in memory, others for a few seconds.

        Raises:
            DataError: Naming the client: a sample of any role cannot be read, inputs differ in shape, are no floats or
                are not finite in float32, or a label is no whole number below `num_classes`.
        """
        with seeded_generators(derive_seed(self.seed, "check")):
            check_clients(self.clients, self.num_classes)

    def fingerprint(self) -> dict[str, str]:
        """A short hash of each client's data by the client's name, the same in every process and on each start.

        Hashed are a client's pool and domain and, for each role, the number of samples and the samples: inputs as they
        are kept (before any normalization, whose numbers are hashed too), and labels. Data sets in memory
        (`ArrayDataset`, `TensorDataset`) are hashed whole. Of others some samples are read, evenly spaced, about 4,000
        over all clients and at least one of each set, with the global generators seeded, for those with random
        transforms.

        Raises:
            DataError: If a sample cannot be read.
        """
        reads = reads_a_set(len(self.clients))
        with seeded_generators(derive_seed(self.seed, "fingerprint")):
            return {client.name: client_hash(client, reads) for client in self.clients}

    def to(self, device: torch.device | str) -> None:
        """Keeps the samples of `ArrayDataset`s on a device from now on; other data sets stay as they are."""
        for client in self.clients:
            for dataset in (client.train, client.val, client.test):
                if isinstance(dataset, ArrayDataset):
                    dataset.arrays.to(device)

    def rng(self, *key: int) -> np.random.Generator:
        """A source of randomness for one purpose, the same on each start; different keys, unrelated numbers."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample, without a batch dimension; that of the first client's first sample."""
        sample: Tensor = self.clients[0].train[0][0]
        return tuple(sample.shape)

    def describe(self) -> list[dict[str, object]]:
        """One row a client: ``client_id, name, pool, domain, train, val, test`` (counts), ``details``."""
        return [
            {
                "client_id": client_id,
                "name": client.name,
                "pool": client.pool,
                "domain": client.domain,
                **dict(zip(ROLES, self.client_sizes(client_id), strict=True)),
                "details": dict(client.details),
            }
            for client_id, client in enumerate(self.clients)
        ]


def _size(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]  # map-style by contract; _check_clients has looked


def _full_signature(cls: type[FederatedDataModule]) -> inspect.Signature:
    """A class's arguments and, where its constructor hands on others, those of the classes above it."""
    found: dict[str, inspect.Parameter] = {}
    constructors = [owner for owner in cls.__mro__ if "__init__" in vars(owner)]
    for owner in constructors:
        _, *own = inspect.signature(vars(owner)["__init__"]).parameters.values()
        hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own)
        for parameter in own:
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in found:
                # What is handed on is handed on by name.
                by_name = parameter.replace(kind=parameter.KEYWORD_ONLY)
                found[parameter.name] = parameter if owner is constructors[0] else by_name
        if not hands_on:
            break
        if owner is FederatedDataModule:
            words = {name: getattr(cls.split, name) for name in cls.split_keys if name not in found}
            keyword = inspect.Parameter.KEYWORD_ONLY
            found |= {name: inspect.Parameter(name, keyword, default=value) for name, value in words.items()}
            break
    return inspect.Signature(list(found.values()))


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise DataError(f"{name} is {value}; it must be at least {least}.")


def _check_clients(clients: tuple[ClientData, ...]) -> None:
    names: set[str] = set()
    for client in clients:
        if client.name in names:
            raise DataError(f"Two clients are called {client.name!r}; a client's name must be unique.")
        names.add(client.name)
        if client.pool not in POOLS:
            raise DataError(f"Client {client.name!r} is in pool {client.pool!r}; the pools are {', '.join(POOLS)}.")
        for role in ROLES:
            dataset = getattr(client, role)
            if not hasattr(dataset, "__len__"):
                raise DataError(f"The {role} set of client {client.name!r} has no length; it must be a map-style one.")
            if len(dataset) == 0:
                raise DataError(f"The {role} set of client {client.name!r} is empty; it needs at least one sample.")
    if not any(client.pool == "seen" for client in clients):
        raise DataError(f"None of the {len(clients)} clients is in the pool 'seen'; at least one must be.")
