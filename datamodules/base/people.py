"""Data sets that people divide: one client a speaker or a writer."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedl2p.datamodules.base.arrays import ArrayDataset, Arrays
from fedl2p.datamodules.base.domains import Samples
from fedl2p.datamodules.base.federated import POOLS, ClientData, FederatedDataModule
from fedl2p.datamodules.base.partition import client_roles
from fedl2p.errors import DataError

_FEWEST = 3  # samples of a client, one a role


@dataclass(frozen=True)
class People:
    """Who could be a client, and of which pools.

    Attributes:
        samples: Of each person, by name.
        seen: Names of those who may be in the pretrain and seen pools.
        unseen: Of those who may be in the unseen pool; the same names where the publisher makes no difference.
    """

    samples: Mapping[str, Samples]
    seen: Sequence[str]
    unseen: Sequence[str]


class PeopleDataModule(FederatedDataModule):
    """One client a person; a subclass says who there is, and reads their samples.

    A subclass sets `num_classes`, and implements `find` and `read`.

    Args:
        batch_size: Samples in a client's training batch, at least 1.
        seed: Fixes who is in which pool, and who has which samples in which role. At least 0.
        seen_clients: At least 1.
        unseen_clients: From 0.
        pretrain_clients: From 0.
        min_samples: People with fewer take no part; at least 3.
        largest_first: Whether the seen people are those with the most samples; they are drawn otherwise.
        val_fraction: Share of a client's samples *that are not for testing* which goes to validation, in (0, 1).
        test_fraction: Share of a client's samples for testing, in (0, 1).

    Raises:
        DataError: If an argument is not as above. `setup` raises it when there are too few people.
    """

    mean: Sequence[float] | None = None
    """What is taken off each channel, in units of the scaled inputs."""
    std: Sequence[float] | None = None
    """What each channel is divided by."""

    def __init__(
        self,
        *,
        batch_size: int = 32,
        seed: int = 0,
        seen_clients: int = 100,
        unseen_clients: int = 0,
        pretrain_clients: int = 0,
        min_samples: int = 10,
        largest_first: bool = False,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.seen_clients = seen_clients
        self.unseen_clients = unseen_clients
        self.pretrain_clients = pretrain_clients
        self.min_samples = min_samples
        self.largest_first = largest_first
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        least = {"seen_clients": 1, "unseen_clients": 0, "pretrain_clients": 0, "min_samples": _FEWEST}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise DataError(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}; it must be above 0 and below 1.")

    @abstractmethod
    def find(self) -> People:
        """Who there is, without reading samples."""

    @abstractmethod
    def read(self, keys: Sequence[Any]) -> Tensor:
        """The inputs of some samples, shape (n, channels, ...), uint8 or floating point."""

    def complete(self, chosen: dict[str, Samples]) -> dict[str, Samples]:
        """The samples of the people who take part, by name; a subclass may change them."""
        return chosen

    def build_clients(self) -> Iterable[ClientData]:
        """Pretrain, seen and unseen clients, in this order; see the class."""
        people = self.find()
        pools = self._pools(people)
        own = self.complete({name: people.samples[name] for name in pools})
        owners = list(own)
        labels = np.concatenate([own[name].labels for name in owners])
        keys = [key for name in owners for key in own[name].keys]
        arrays = Arrays(self.read(keys), labels, mean=self.mean, std=self.std)
        start = 0
        for number, name in enumerate(owners):
            rows = start + np.arange(len(own[name]))
            start += len(rows)
            parts = client_roles(
                own[name].labels, self.val_fraction * (1 - self.test_fraction), self.test_fraction, self._rng(1, number)
            )
            train, val, test = (ArrayDataset(arrays, rows[part]) for part in parts)
            yield ClientData(
                name=f"{pools[name]}-{name}",
                pool=pools[name],
                train=train,
                val=val,
                test=test,
                details={"size": float(len(train))},
            )

    def _pools(self, people: People) -> dict[str, str]:
        """Each client's pool by name, in the order of the pools."""
        large = {name for name, samples in people.samples.items() if len(samples) >= self.min_samples}
        rng = self._rng(0)
        known = [str(name) for name in rng.permutation(sorted(set(people.seen) & large))]
        if self.largest_first:
            known.sort(key=lambda name: len(people.samples[name]), reverse=True)
        seen, rest = known[: self.seen_clients], known[self.seen_clients :]
        pretrain = rest[: self.pretrain_clients]
        taken = {*seen, *pretrain}
        others = [str(name) for name in rng.permutation(sorted(set(people.unseen) & large - taken))]
        unseen = others[: self.unseen_clients]
        wanted = {"pretrain": self.pretrain_clients, "seen": self.seen_clients, "unseen": self.unseen_clients}
        chosen = {"pretrain": pretrain, "seen": seen, "unseen": unseen}
        for pool in POOLS:
            if len(chosen[pool]) < wanted[pool]:
                raise DataError(
                    f"{wanted[pool]} {pool} clients are wanted, but {len(chosen[pool])} people with at least "
                    f"{self.min_samples} samples are left for that pool; ask for fewer, or lower min_samples."
                )
        return {name: pool for pool in POOLS for name in sorted(chosen[pool])}

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
