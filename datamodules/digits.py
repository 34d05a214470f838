"""Handwritten digits that come with scikit-learn, as a federation with label skew and feature shift.

Source: "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), UCI Machine Learning
Repository; the 1,797 images of its test part. Nothing is downloaded, so this is the data set of first runs,
tests and demonstrations.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.datamodules.base.partition import (
    FloatArray,
    IntArray,
    label_proportions,
    partition_by_proportions,
    stratified_roles,
)
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.corruptions.digits import CORRUPTIONS
from fedl2p.errors import DataError
from fedl2p.pools import POOLS, ROLES

DOMAINS = ("noise", "blur", "contrast", "brightness", "rotation", "inversion")
_POOL_FRACTIONS = (0.30, 0.42, 0.28)  # in the order of POOLS
# Fewer test images, and strongly skewed clients would run out of the classes that they train on.
_ROLE_FRACTIONS = (0.40, 0.30, 0.30)
_PRETRAIN_HOLDOUT = 0.15  # of a pretrain client's images, for val and again for test
_PRETRAIN_MOST = 53  # clients of at least 10 images, so that neither val nor test is empty


@dataclass(frozen=True)
class _Plan:
    """One client before its images are made: `images` has its image numbers by role."""

    pool: str
    domain: str
    number: int
    severity: float
    images: Mapping[str, IntArray]


class DigitsDataModule(FederatedDataModule):
    """The 8x8 digits: inputs of shape (1, 8, 8) in [0, 1], 10 classes.

    Pools share no image. Pretrain clients have clean images and equal shares of all digits. In the seen and
    the unseen pool each image is for training, for validation or for testing, whatever its corruption, so no
    client is tested on an image that another trained on. Each domain is one corruption of all its pool's
    images, dealt to its clients without using one twice: severities from 0 to 1, label proportions from a
    Dirichlet distribution, and those of the training set again in val and test (as far as the domain still
    has such images).

    Args:
        domains: Kinds of corruption, each at most once; of ``fedl2p.datamodules.corruptions.digits.CORRUPTIONS``.
        train_sizes: Numbers of training images, at least 2; each domain deals them out in turn, in random
            order. A client with n has max(8, n / 2) images in val and as many in test.
        **options: `batch_size`, and the words of `Split` in `split_keys`. There are 1 to 53 pretrain clients; seen and
            unseen ones are spread over the domains, at least one in each; `alpha` is a number.

    Raises:
        DataError: If an argument is not as above. `setup` raises it when a domain has too few images.
    """

    num_classes = 10
    split = Split(alpha=0.5, pretrain_clients=10, seen_clients=48, unseen_clients=24)
    alpha: float
    split_keys = ("seed", "alpha", "pretrain_clients", "seen_clients", "unseen_clients")

    def __init__(
        self, *, domains: Sequence[str] = DOMAINS, train_sizes: Sequence[int] = (8, 16, 32, 64), **options: Any
    ) -> None:
        super().__init__(**options)
        self.domains = tuple(domains)
        self.train_sizes = tuple(train_sizes)
        self._check_arguments()

    def build_clients(self) -> Iterable[ClientData]:
        """Pretrain, seen and unseen clients, in this order; see the class."""
        images, labels = _load()
        for plan in self._plans(labels):
            yield self._client(plan, images, torch.from_numpy(labels))

    def _plans(self, labels: IntArray) -> list[_Plan]:
        """Who gets which images."""
        pretrain, seen, unseen = stratified_roles(labels, _POOL_FRACTIONS, self.rng(0))
        shifted = (("seen", seen, self.split.seen_clients), ("unseen", unseen, self.split.unseen_clients))
        roles = {}
        for pool, members, num_clients in shifted:
            parts = stratified_roles(labels[members], _ROLE_FRACTIONS, self.rng(1, POOLS.index(pool)))
            roles[pool] = {role: members[part] for role, part in zip(ROLES, parts, strict=True)}
            self._check_supply(pool, num_clients, roles[pool])
        plans = list(self._pretrain_plans(pretrain, labels))
        for pool, _, num_clients in shifted:
            for domain, count in zip(self.domains, self._clients_a_domain(num_clients), strict=True):
                plans += self._domain_plans(pool, domain, count, roles[pool], labels)
        return plans

    def _pretrain_plans(self, members: IntArray, labels: IntArray) -> Iterator[_Plan]:
        rng = self.rng(2)
        size = len(members) // self.split.pretrain_clients
        held = round(_PRETRAIN_HOLDOUT * size)
        even = np.ones((self.split.pretrain_clients, self.num_classes))
        parts = partition_by_proportions(labels[members], even, np.full(self.split.pretrain_clients, size), rng)
        for number, part in enumerate(parts):
            val, test, train = np.split(rng.permutation(members[part]), [held, 2 * held])
            yield _Plan("pretrain", "clean", number, 0.0, {"train": train, "val": val, "test": test})

    def _domain_plans(
        self, pool: str, domain: str, count: int, supply: Mapping[str, IntArray], labels: IntArray
    ) -> Iterator[_Plan]:
        # A domain has a stream of its own, so that adding another one leaves its clients as they are.
        rng = self.rng(3, POOLS.index(pool), DOMAINS.index(domain))
        sizes = self._sizes(count)
        order = rng.permutation(count)  # so that a client's size says nothing of its severity
        proportions: FloatArray = label_proportions(count, self.num_classes, self.alpha, rng)
        images: dict[str, list[IntArray]] = {}
        for role in ROLES:
            members = supply[role]
            parts = partition_by_proportions(labels[members], proportions, sizes[role][order], rng)
            images[role] = [members[part] for part in parts]
            if role == "train":
                # Val and test follow what the client really got, where a class ran short in training.
                proportions = np.stack(
                    [np.bincount(labels[own], minlength=self.num_classes) for own in images["train"]]
                )
        for number, severity in enumerate(_severities(count)):
            own = {role: images[role][number] for role in ROLES}
            yield _Plan(pool, domain, number, float(severity), own)

    def _client(self, plan: _Plan, images: Tensor, labels: Tensor) -> ClientData:
        """Makes a client's images; each of its three sets holds inputs (n, 1, 8, 8) and labels (n,)."""
        seed = self.rng(4, POOLS.index(plan.pool), plan.number).integers(2**62)
        generator = torch.Generator().manual_seed(int(seed))
        sets = {}
        for role in ROLES:
            own = torch.from_numpy(plan.images[role])
            inputs = images[own]
            if plan.domain in CORRUPTIONS:
                inputs = CORRUPTIONS[plan.domain](inputs, plan.severity, generator)
            sets[role] = TensorDataset(inputs, labels[own])
        return ClientData(
            name=f"{plan.pool}-{plan.domain}-{plan.number:02d}",
            pool=plan.pool,
            domain=plan.domain,
            details={"severity": plan.severity, "size": float(len(sets["train"]))},
            **sets,
        )

    def _sizes(self, count: int) -> dict[str, IntArray]:
        """Samples of a domain's clients by role, each of shape (count,)."""
        train = np.resize(np.array(self.train_sizes, dtype=np.int64), count)
        return {
            "train": train,
            "val": np.maximum(8, np.rint(train / 2).astype(np.int64)),
            "test": np.maximum(8, np.rint(train / 2).astype(np.int64)),
        }

    def _clients_a_domain(self, num_clients: int) -> list[int]:
        """The clients of each domain, as even as possible."""
        least, more = divmod(num_clients, len(self.domains))
        return [least + (position < more) for position in range(len(self.domains))]

    def _check_supply(self, pool: str, num_clients: int, supply: Mapping[str, IntArray]) -> None:
        count = max(self._clients_a_domain(num_clients))
        for role, sizes in self._sizes(count).items():
            if sizes.sum() > len(supply[role]):
                raise DataError(
                    f"The {count} {pool} clients of a domain want {sizes.sum()} {role} images, but the pool "
                    f"has {len(supply[role])}; choose fewer clients or smaller train_sizes."
                )

    def _check_arguments(self) -> None:
        unknown = [domain for domain in self.domains if domain not in DOMAINS]
        if unknown or not self.domains or len(set(self.domains)) < len(self.domains):
            raise DataError(
                f"The domains are {list(self.domains)}; they must be some of {', '.join(DOMAINS)}, each at most once."
            )
        if self.split.alpha is None:
            raise DataError("alpha is None; it must be a positive number here.")
        if not self.train_sizes or min(self.train_sizes) < 2:
            raise DataError(f"train_sizes is {list(self.train_sizes)}; it must be whole numbers of at least 2.")
        if not 1 <= self.split.pretrain_clients <= _PRETRAIN_MOST:
            raise DataError(
                f"pretrain_clients is {self.split.pretrain_clients}; it must be from 1 to {_PRETRAIN_MOST}."
            )
        for name in ("seen_clients", "unseen_clients"):
            if getattr(self.split, name) < len(self.domains):
                raise DataError(
                    f"{name} is {getattr(self.split, name)}; it must be at least {len(self.domains)}, one a domain."
                )


def _severities(count: int) -> FloatArray:
    """Severities of a domain's clients: about a third without a shift, the others in even steps up to the strongest.

    An only client has the strongest.
    """
    unshifted = (count + 1) // 3
    return np.concatenate([np.zeros(unshifted), np.linspace(0, 1, count - unshifted + 1)[1:]])


@functools.cache
def _load() -> tuple[Tensor, IntArray]:
    """All images, float32 in [0, 1] of shape (1797, 1, 8, 8), and their labels, int64 of shape (1797,).

    Read once a process; callers must not write into either.
    """
    # Imported here because it takes longer than all the rest, and other data modules do without.
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    return images, digits.target.astype(np.int64)
