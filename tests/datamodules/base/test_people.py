"""One client a person: who takes part, and what they have."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedl2p.datamodules.base.arrays import labels_of
from fedl2p.datamodules.base.domains import Samples
from fedl2p.datamodules.base.people import People, PeopleDataModule
from fedl2p.errors import DataError

COUNTS = {"ann": 40, "ben": 30, "cat": 20, "dan": 12, "eve": 12, "fay": 12, "gil": 4}


class Letters(PeopleDataModule):
    """People with numbered samples of three classes; two of them are kept for the unseen pool."""

    num_classes = 3

    def find(self) -> People:
        samples = {}
        for start, (name, count) in enumerate(COUNTS.items()):
            keys = [1000 * start + number for number in range(count)]
            samples[name] = Samples(keys, np.arange(count) % 3)
        return People(samples, [name for name in COUNTS if name not in ("eve", "fay")], ["eve", "fay"])

    def read(self, keys: Sequence[Any]) -> Tensor:
        return torch.tensor(keys, dtype=torch.float32).reshape(-1, 1, 1, 1)


def module(**options: Any) -> Letters:
    settings: dict[str, Any] = {"seen_clients": 2, "unseen_clients": 2, "pretrain_clients": 1}
    return Letters(**(settings | options))


def test_every_sample_of_a_person_is_in_one_role_of_one_client() -> None:
    data = module()
    for client in data.clients:
        name = client.name.split("-")[1]
        numbers = [int(x) for role in (client.train, client.val, client.test) for x, _ in role]
        start = 1000 * list(COUNTS).index(name)
        assert sorted(numbers) == list(range(start, start + COUNTS[name]))


def test_roles_have_the_wanted_shares_and_the_same_labels() -> None:
    data = module(seen_clients=4, pretrain_clients=0, val_fraction=0.25, test_fraction=0.2)
    ann = next(client for client in data.clients if client.name.endswith("ann"))
    counts = [np.bincount(labels_of(role), minlength=3) for role in (ann.train, ann.val, ann.test)]
    assert [int(count.sum()) for count in counts] == [24, 8, 8]
    for count in counts:
        assert count.max() - count.min() <= 1


def test_pools_are_of_the_people_who_may_be_in_them() -> None:
    data = module()
    names = {pool: {data.clients[i].name for i in data.pool(pool)} for pool in ("pretrain", "seen", "unseen")}
    assert names["unseen"] == {"unseen-eve", "unseen-fay"}
    assert len(names["seen"]) == 2 and len(names["pretrain"]) == 1
    assert not any(name.endswith("gil") for pool in names.values() for name in pool)


def test_the_largest_can_be_first() -> None:
    data = module(largest_first=True)
    assert [client.name for client in data.clients] == [
        "pretrain-cat",
        "seen-ann",
        "seen-ben",
        "unseen-eve",
        "unseen-fay",
    ]


def test_seen_and_unseen_people_are_of_comparable_size_where_anybody_may_be_either() -> None:
    class Anybody(Letters):
        def find(self) -> People:
            names = [f"{number:02d}" for number in range(60)]
            samples = {name: Samples(list(range(10 + int(name))), np.arange(10 + int(name)) % 3) for name in names}
            return People(samples, names, names)

    sizes: dict[str, list[int]] = {"pretrain": [], "seen": [], "unseen": []}
    for seed in range(10):
        data = Anybody(seen_clients=20, unseen_clients=10, pretrain_clients=5, largest_first=True, seed=seed)
        for client in data.clients:
            sizes[client.pool].append(10 + int(client.name[-2:]))
        assert {10 + int(client.name[-2:]) for client in data.clients} == set(range(35, 70))
    assert abs(np.mean(sizes["seen"]) - np.mean(sizes["unseen"])) < 3
    assert max(sizes["pretrain"]) < 40


def test_the_seed_draws_people_and_samples() -> None:
    def drawn(seed: int) -> list[str]:
        return [
            f"{client.name} {labels_of(client.test)} {int(client.test[0][0])}" for client in module(seed=seed).clients
        ]

    assert drawn(3) == drawn(3)
    assert len({str(drawn(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"seen_clients": 5, "pretrain_clients": 0},
            "5 seen clients are wanted, but 4 people with at least 10",
        ),
        ({"unseen_clients": 3}, "3 unseen clients are wanted, but 2 people"),
        ({"pretrain_clients": 3}, "3 pretrain clients are wanted, but 2 people"),
        ({"seen_clients": 0}, "seen_clients is 0; it must be at least 1"),
        ({"min_samples": 2}, "min_samples is 2; it must be at least 3"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"test_fraction": float("nan")}, "test_fraction is nan"),
    ],
)
def test_what_cannot_be_had_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        module(**options).setup()
