"""One vocabulary for how any data set is divided among clients, with each word's default and bounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from fedl2p.errors import DataError

MIN_PERSON_SAMPLES = 3
"""Fewest samples of a person who is a client: one a role."""


def _count(default: int | None, least: int) -> Any:
    return field(default=default, metadata={"least": least})


def _share(default: float, *, zero: bool = False) -> Any:
    return field(default=default, metadata={"share": True, "zero": zero})


@dataclass(frozen=True, kw_only=True)
class Split:
    """How samples become clients: in which pools, how many, how large, with which labels, in which roles.

    A data module takes some of these words as keyword arguments (its `split_keys`), and may have defaults of its own.

    Attributes:
        seed: Fixes who has which samples; nothing else does. From 0.
        domains: Names of the domains that are used, in the order of the clients; None is all.
        pretrain_domains: Domains that have pretrain clients; None is all.
        equal_domains: Cut every domain, at random, to the size of the smallest.
        seen_clients: Clients of the seen pool (who learn together) in the whole federation, at least 1.
        unseen_clients: Likewise of the unseen pool (who come afterwards), from 0.
        pretrain_clients: Likewise of the pretrain pool (who make the global model), from 0.
        clients_per_domain: Clients of the seen pool in each domain, at least 1.
        unseen_clients_per_domain: Likewise of the unseen pool, from 0.
        pretrain_clients_per_domain: Likewise of the pretrain pool, from 0.
        unseen_fraction: Share of the clients that are unseen, from 0 and below 1, where others say who the clients are.
        pretrain_fraction: Likewise for the pretrain pool; together below 1.
        alpha: Concentration of the Dirichlet distribution that the clients' label shares are drawn from, above 0: 0.1
            is strong skew, 1000 is none. None gives each client the labels of the whole.
        client_size: Samples of a client, without those of a test split that the publisher made; at least 2. None deals
            out all that there are.
        min_samples: People with fewer samples are no clients; at least 3.
        largest_first: Take the people with the most samples, instead of drawing them.
        val_fraction: Share of a client's samples *that are not for testing* which goes to validation, in (0, 1).
        test_fraction: Share of a client's samples for testing, in (0, 1).

    Raises:
        DataError: If a value is not as above.
    """

    seed: int = _count(0, 0)
    domains: Sequence[str] | None = None
    pretrain_domains: Sequence[str] | None = None
    equal_domains: bool = False
    seen_clients: int = _count(1, 1)
    unseen_clients: int = _count(0, 0)
    pretrain_clients: int = _count(0, 0)
    clients_per_domain: int = _count(1, 1)
    unseen_clients_per_domain: int = _count(0, 0)
    pretrain_clients_per_domain: int = _count(0, 0)
    unseen_fraction: float = _share(0.0, zero=True)
    pretrain_fraction: float = _share(0.0, zero=True)
    alpha: float | None = None
    client_size: int | None = _count(None, 2)
    min_samples: int = _count(10, MIN_PERSON_SAMPLES)
    largest_first: bool = False
    val_fraction: float = _share(0.2)
    test_fraction: float = _share(0.2)

    def __post_init__(self) -> None:
        """Checks every value, and turns lists of names into tuples."""
        for word in fields(self):
            value = getattr(self, word.name)
            if "least" in word.metadata and not (value is None and word.default is None):
                _check_count(word.name, value, word.metadata["least"])
            elif "share" in word.metadata:
                _check_share(word.name, value, zero=word.metadata["zero"])
            elif word.name.endswith("domains") and word.default is None and value is not None:
                object.__setattr__(self, word.name, _names(word.name, value))
        if self.alpha is not None and not (_is_number(self.alpha) and self.alpha > 0):
            raise DataError(f"alpha is {self.alpha!r}; it must be a positive number, or None for no skew.")
        if self.unseen_fraction + self.pretrain_fraction >= 1:
            raise DataError(
                f"unseen_fraction is {self.unseen_fraction} and pretrain_fraction {self.pretrain_fraction}; they must "
                "be together below 1."
            )

    @property
    def val_share(self) -> float:
        """Share of *all* of a client's samples which goes to validation."""
        return self.val_fraction * (1 - self.test_fraction)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise DataError(f"{name} is {value!r}; it must be at least {least}, a whole number.")


def _check_share(name: str, value: float, *, zero: bool) -> None:
    if not (_is_number(value) and value < 1 and (value > 0 or (zero and value == 0))):
        raise DataError(f"{name} is {value!r}; it must be {'from 0' if zero else 'above 0'} and below 1.")


def _names(word: str, given: Sequence[str]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names or len(set(names)) < len(names):
        raise DataError(f"{word} is {list(names)}; name at least one, and each at most once.")
    return names
