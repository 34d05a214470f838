"""Data sets that people divide: one client a speaker or a writer."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedl2p.datamodules.base.arrays import ArrayDataset, Arrays
from fedl2p.datamodules.base.domains import Samples
from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.datamodules.base.partition import client_roles
from fedl2p.datamodules.base.split import Split
from fedl2p.errors import DataError
from fedl2p.pools import POOLS


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
        **options: `batch_size`, and the words of `Split` in `split_keys`.

    Raises:
        DataError: If an argument is not as above. `setup` raises it when there are too few people.
    """

    split = Split(seen_clients=100)
    split_keys: tuple[str, ...] = (
        "seed",
        "seen_clients",
        "unseen_clients",
        "pretrain_clients",
        "min_samples",
        "largest_first",
        "val_fraction",
        "test_fraction",
    )
    mean: Sequence[float] | None = None
    """What is taken off each channel, in units of the scaled inputs."""
    std: Sequence[float] | None = None
    """What each channel is divided by."""

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
        people, split = self.find(), self.split
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
            parts = client_roles(own[name].labels, split.val_share, split.test_fraction, self.rng(1, number))
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
        split = self.split
        large = {name for name, samples in people.samples.items() if len(samples) >= split.min_samples}
        rng = self.rng(0)
        known = [str(name) for name in rng.permutation(sorted(set(people.seen) & large))]
        if split.largest_first:
            known.sort(key=lambda name: len(people.samples[name]), reverse=True)
        seen, rest = known[: split.seen_clients], known[split.seen_clients :]
        pretrain = rest[: split.pretrain_clients]
        taken = {*seen, *pretrain}
        others = [str(name) for name in rng.permutation(sorted(set(people.unseen) & large - taken))]
        unseen = others[: split.unseen_clients]
        wanted = {"pretrain": split.pretrain_clients, "seen": split.seen_clients, "unseen": split.unseen_clients}
        chosen = {"pretrain": pretrain, "seen": seen, "unseen": unseen}
        for pool in POOLS:
            if len(chosen[pool]) < wanted[pool]:
                raise DataError(
                    f"{wanted[pool]} {pool} clients are wanted, but {len(chosen[pool])} people with at least "
                    f"{split.min_samples} samples are left for that pool; ask for fewer, or lower min_samples."
                )
        return {name: pool for pool in POOLS for name in sorted(chosen[pool])}
