"""Labelled samples of several domains, dealt to clients inside each domain: what all sets with feature shift share."""

import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedl2p.datamodules.base.arrays import ArrayDataset, Arrays, Augmentation
from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.datamodules.base.partition import IntArray, dirichlet_clients, stratified_roles
from fedl2p.errors import DataError
from fedl2p.pools import POOLS, ROLES


@dataclass(frozen=True)
class Samples:
    """Some samples that are not read yet.

    Attributes:
        keys: What `DomainsDataModule.read` needs to know of each, such as the path of a file.
        labels: Class numbers, shape (n,), int64.
    """

    keys: Sequence[Any]
    labels: IntArray

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.labels)

    def take(self, rows: IntArray) -> "Samples":
        """Some of them, by position."""
        return Samples([self.keys[row] for row in rows], self.labels[rows])


@dataclass(frozen=True)
class Domain:
    """One domain's samples.

    Attributes:
        name: Of the domain.
        samples: All of them, or those for training and validation where there is a split.
        test: Those for testing, where the publisher has split the domain; None takes them from `samples`.
    """

    name: str
    samples: Samples
    test: Samples | None = None


@dataclass(frozen=True)
class _Plan:
    """One client before anything is read."""

    pool: str
    domain: str
    number: int
    sets: dict[str, Samples]


class DomainsDataModule(FederatedDataModule):
    """Domains whose samples are dealt to clients; a subclass says which samples there are, and reads them.

    In each domain the pools get shares of the samples by their numbers of clients, with the same labels; inside a
    pool, clients of equal size get labels by a Dirichlet distribution. No sample belongs to two clients. Only samples
    that belong to a client are read, into one array.

    A subclass sets `num_classes`, and implements `find` and `read`.

    Args:
        domains: Names of the domains, in the order of the clients; None takes all.
        **options: `batch_size`, and the words of `Split` in `split_keys`.

    Raises:
        DataError: If an argument is not as above. `setup` raises it when a domain has too few samples.
    """

    split_keys: tuple[str, ...] = (
        "seed",
        "domains",
        "alpha",
        "clients_per_domain",
        "unseen_clients_per_domain",
        "pretrain_clients_per_domain",
        "pretrain_domains",
        "client_size",
        "val_fraction",
        "test_fraction",
        "equal_domains",
    )
    domain_names: tuple[str, ...] = ()
    """Names of all domains, where they are known before anything is read."""
    augmentation: Augmentation | None = None
    """What is done to training batches."""
    mean: Sequence[float] | None = None
    """What is taken off each channel, in units of the scaled inputs."""
    std: Sequence[float] | None = None
    """What each channel is divided by."""
    same_samples: bool = False
    """Whether all domains show the same underlying samples, in one order; pools then divide them alike everywhere."""

    def __init__(self, domains: Sequence[str] | None = None, **options: Any) -> None:
        if domains is not None:
            options["domains"] = domains
        super().__init__(**options)
        self.domains = self.split.domains or self.domain_names or None
        if self.domain_names:
            _check_names(self.domains or (), self.domain_names)

    @abstractmethod
    def find(self) -> Iterable[Domain]:
        """The domains and which samples they have, without reading these; at least those named by `domains`."""

    @abstractmethod
    def read(self, keys: Sequence[Any]) -> Tensor:
        """The inputs of some samples, shape (n, channels, ...), uint8 or floating point."""

    def build_clients(self) -> Iterable[ClientData]:
        """Pretrain, seen and unseen clients, in this order, by domain; see the class."""
        plans = self._plans()
        roles = [(plan, role) for plan in plans for role in ROLES]
        sizes = [len(plan.sets[role]) for plan, role in roles]
        keys = [key for plan, role in roles for key in plan.sets[role].keys]
        labels = np.concatenate([plan.sets[role].labels for plan, role in roles])
        arrays = Arrays(self.read(keys), labels, mean=self.mean, std=self.std)
        rows = iter(np.split(np.arange(len(labels)), np.cumsum(sizes)[:-1]))
        for plan in plans:
            sets = {role: ArrayDataset(arrays, next(rows), augmentation=self.augmentation) for role in ROLES}
            yield ClientData(
                name=f"{plan.pool}-{plan.domain}-{plan.number:02d}",
                pool=plan.pool,
                domain=plan.domain,
                details={"size": float(len(sets["train"]))},
                **sets,
            )

    def client_counts(self, domain: str) -> tuple[int, int, int]:
        """How many clients a domain has in each of `POOLS`."""
        split = self.split
        pretrains = split.pretrain_domains is None or domain in split.pretrain_domains
        pretrain = split.pretrain_clients_per_domain if pretrains else 0
        return pretrain, split.clients_per_domain, split.unseen_clients_per_domain

    def _plans(self) -> list[_Plan]:
        """Who gets which samples, by pool and domain."""
        plans = [plan for domain in self._chosen_domains() for plan in self._domain_plans(domain)]
        return sorted(plans, key=lambda plan: POOLS.index(plan.pool))

    def _chosen_domains(self) -> list[Domain]:
        """The wanted domains in the wanted order, cut to the size of the smallest where that was asked for."""
        found = {domain.name: domain for domain in self.find()}
        names = tuple(found) if self.domains is None else self.domains
        _check_names(names, tuple(found))
        _check_names(self.split.pretrain_domains or (), names)
        domains = [found[name] for name in names]
        for domain in domains:
            for samples in (domain.samples, domain.test):
                if samples is not None and not len(samples):
                    which = " for testing" if samples is domain.test else ""
                    raise DataError(f"The domain {domain.name!r} has no samples{which}.")
        if not self.split.equal_domains:
            return domains
        smallest = min(len(domain.samples) for domain in domains)
        smallest_test = min((len(domain.test) for domain in domains if domain.test is not None), default=0)
        return [self._cut(domain, smallest, smallest_test) for domain in domains]

    def _cut(self, domain: Domain, size: int, test_size: int) -> Domain:
        rng = self._rng(0, domain.name)
        samples = domain.samples.take(np.sort(rng.choice(len(domain.samples), size, replace=False)))
        if domain.test is None:
            return Domain(domain.name, samples)
        return Domain(
            domain.name, samples, domain.test.take(np.sort(rng.choice(len(domain.test), test_size, replace=False)))
        )

    def _domain_plans(self, domain: Domain) -> Iterator[_Plan]:
        rng = self._rng(1, domain.name)
        counts = np.array(self.client_counts(domain.name))
        fractions = list(counts / counts.sum())
        dividing = self._rng(2, "") if self.same_samples else rng
        supplies = stratified_roles(domain.samples.labels, fractions, dividing)
        tests = (
            [None] * len(POOLS) if domain.test is None else stratified_roles(domain.test.labels, fractions, dividing)
        )
        for pool, count, supply, test in zip(POOLS, counts, supplies, tests, strict=True):
            if not count:
                continue
            own = domain.samples.take(supply)
            own_test = None if domain.test is None or test is None else domain.test.take(test)
            try:
                dealt = self._dealt(own, own_test, int(count), rng)
            except DataError as error:
                raise DataError(f"Domain {domain.name!r}, pool {pool!r}: {error}") from error
            for number, sets in enumerate(dealt):
                yield _Plan(pool, domain.name, number, sets)

    def _dealt(
        self, samples: Samples, test: Samples | None, count: int, rng: np.random.Generator
    ) -> list[dict[str, Samples]]:
        """The sets of a pool's clients."""
        held = 0.0 if test is not None else self.split.test_fraction
        parts = dirichlet_clients(
            samples.labels,
            count,
            self.split.alpha,
            rng,
            val_fraction=self.split.val_fraction * (1 - held),
            test_fraction=held,
            test_labels=None if test is None else test.labels,
            client_size=self.split.client_size,
        )
        source = {"train": samples, "val": samples, "test": samples if test is None else test}
        return [{role: source[role].take(rows) for role, rows in zip(ROLES, part, strict=True)} for part in parts]

    def _rng(self, purpose: int, domain: str) -> np.random.Generator:
        # By the name, so that a domain's clients do not depend on which other domains there are.
        return self.rng(purpose, zlib.crc32(domain.encode()))


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(f"There is no domain {unknown[0]!r}; the domains are {', '.join(known)}.")
