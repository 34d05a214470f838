"""Domains dealt to clients: nothing twice, pools apart, equal sizes, the same labels in each role."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedl2p.datamodules import ClientData
from fedl2p.datamodules.base.arrays import ArrayDataset
from fedl2p.datamodules.base.domains import Domain, DomainsDataModule, Samples
from fedl2p.errors import DataError

ROLES = ("train", "val", "test")
SIZES = {"a": 120, "b": 90, "c": 200}


def labels_of_domain(name: str, size: int, classes: int = 5) -> np.ndarray:
    return np.random.default_rng([ord(name), size]).integers(classes, size=size)


class Numbered(DomainsDataModule):
    """A sample's only value says which one it is: 1000 * domain + position."""

    num_classes = 5

    def __init__(self, domains: Sequence[str] | None = None, tests: dict[str, int] | None = None, **more: Any) -> None:
        super().__init__(domains, **more)
        self.tests = tests

    def find(self) -> Iterable[Domain]:
        for number, (name, size) in enumerate(SIZES.items(), start=1):
            test = None
            if self.tests is not None:
                keys = [-1000 * number - i for i in range(self.tests[name])]
                test = Samples(keys, labels_of_domain(name, len(keys)))
            yield Domain(name, Samples([1000 * number + i for i in range(size)], labels_of_domain(name, size)), test)

    def read(self, keys: Sequence[Any]) -> Tensor:
        return torch.tensor(list(keys), dtype=torch.float32)[:, None]


def held(client: ClientData, role: str) -> list[int]:
    """Which samples a client has."""
    dataset = getattr(client, role)
    assert isinstance(dataset, ArrayDataset)
    return dataset[list(range(len(dataset)))][0][:, 0].int().tolist()


def histogram(client: ClientData, role: str) -> np.ndarray:
    dataset = getattr(client, role)
    return np.bincount(dataset.arrays.labels[dataset.rows].numpy(), minlength=5)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.sampled_from([None, 0.01, 0.5, 1000.0]),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_no_sample_is_dealt_twice_and_sizes_are_equal(
    alpha: float | None, seen: int, unseen: int, pretrain: int, equal: bool, split: bool, seed: int
) -> None:
    module = Numbered(
        tests={"a": 40, "b": 30, "c": 60} if split else None,
        alpha=alpha,
        clients_per_domain=seen,
        unseen_clients_per_domain=unseen,
        pretrain_clients_per_domain=pretrain,
        equal_domains=equal,
        seed=seed,
    )
    together = [key for client in module.clients for role in ROLES for key in held(client, role)]
    assert len(set(together)) == len(together)
    counts = [len(module.pool(pool)) for pool in ("pretrain", "seen", "unseen")]
    assert counts == [3 * pretrain, 3 * seen, 3 * unseen]
    for client in module.clients:
        number = list(SIZES).index(client.domain) + 1
        assert {abs(key) // 1000 for role in ROLES for key in held(client, role)} == {number}
        assert all((key < 0) == (split and role == "test") for role in ROLES for key in held(client, role))
    for domain, pool in {(client.domain, client.pool) for client in module.clients}:
        own = [client for client in module.clients if (client.domain, client.pool) == (domain, pool)]
        assert len({sum(len(held(client, role)) for role in ROLES) for client in own}) == 1


def test_labels_belong_to_their_samples() -> None:
    for client in Numbered(clients_per_domain=3, tests={"a": 40, "b": 30, "c": 60}).clients:
        for role in ROLES:
            dataset = getattr(client, role)
            for key, label in zip(held(client, role), dataset.arrays.labels[dataset.rows], strict=True):
                size = {"a": 40, "b": 30, "c": 60}[client.domain] if key < 0 else SIZES[client.domain]
                assert labels_of_domain(client.domain, size)[abs(key) % 1000] == label


def test_names_order_and_details() -> None:
    module = Numbered(["c", "a"], clients_per_domain=2, unseen_clients_per_domain=1, pretrain_clients_per_domain=1)
    assert [client.name for client in module.clients] == [
        "pretrain-c-00",
        "pretrain-a-00",
        "seen-c-00",
        "seen-c-01",
        "seen-a-00",
        "seen-a-01",
        "unseen-c-00",
        "unseen-a-00",
    ]
    assert all(row["details"] == {"size": row["train"]} for row in module.describe())


def test_a_client_gets_the_asked_fractions_and_its_own_labels_in_each_role() -> None:
    for alpha in (None, 0.1, 1000.0):
        module = Numbered(alpha=alpha, clients_per_domain=2, val_fraction=0.25, test_fraction=0.2)
        for client in module.clients:
            sizes = [len(held(client, role)) for role in ROLES]
            assert sizes == pytest.approx([0.6 * sum(sizes), 0.2 * sum(sizes), 0.2 * sum(sizes)], abs=1)
            for role, share in (("val", 1 / 3), ("test", 1 / 3)):
                assert (np.abs(histogram(client, role) - share * histogram(client, "train")) < 1.4).all()


def test_a_publishers_test_samples_follow_the_clients_labels() -> None:
    module = Numbered(alpha=0.2, clients_per_domain=4, tests={"a": 400, "b": 400, "c": 400}, test_fraction=0.9)
    distances = []
    for client in module.clients:
        own = histogram(client, "train") + histogram(client, "val")
        assert sum(own) == SIZES[client.domain] // 4 and len(held(client, "test")) == 100
        distances.append(np.abs(histogram(client, "test") / 100 - own / own.sum()).sum() / 2)
    assert np.mean(distances) < 0.2


def test_no_alpha_means_the_labels_of_the_domain_and_a_small_one_means_skew() -> None:
    def spread(alpha: float | None) -> float:
        clients = Numbered(alpha=alpha, clients_per_domain=5).clients
        return float(
            np.mean([histogram(client, "train").max() / histogram(client, "train").sum() for client in clients])
        )

    assert spread(None) < 0.35
    assert spread(0.1) > 0.5


def test_equal_domains_are_cut_to_the_smallest_by_the_seed() -> None:
    first, again, other = (Numbered(equal_domains=True, seed=seed) for seed in (0, 0, 1))
    kept = [[sorted(k for r in ROLES for k in held(c, r)) for c in module.clients] for module in (first, again, other)]
    assert [len(keys) for keys in kept[0]] == [90, 90, 90]
    assert kept[0] == kept[1]
    assert kept[0][0] != kept[2][0] and kept[0][1] == kept[2][1]  # the smallest keeps all that it has
    cut = Numbered(equal_domains=True, tests={"a": 40, "b": 30, "c": 20})
    assert {len(held(client, "test")) for client in cut.clients} == {20}


def test_only_samples_of_clients_are_read() -> None:
    module = Numbered(equal_domains=True, clients_per_domain=2, client_size=10)
    arrays = module.clients[0].train.arrays  # type: ignore[attr-defined]
    assert len(arrays.labels) == 60
    assert all(client.val.arrays is arrays for client in module.clients)  # type: ignore[attr-defined]


def test_a_domain_does_not_depend_on_the_others() -> None:
    alone, together = Numbered(["b"], clients_per_domain=3), Numbered(clients_per_domain=3)
    mine = [[held(client, role) for role in ROLES] for client in alone.clients]
    assert mine == [[held(c, role) for role in ROLES] for c in together.clients if c.domain == "b"]


def test_pretrain_clients_may_be_of_some_domains_alone() -> None:
    module = Numbered(pretrain_clients_per_domain=2, pretrain_domains=["b"])
    assert [module.clients[i].domain for i in module.pool("pretrain")] == ["b", "b"]
    pools = [
        {key for i in module.pool(pool) for role in ROLES for key in held(module.clients[i], role)}
        for pool in ("pretrain", "seen")
    ]
    assert all(one and not one & other for one, other in combinations(pools, 2))


def test_domains_that_are_kept_aside_have_unseen_clients_alone_and_leave_the_others_as_they_are() -> None:
    options: dict[str, Any] = {"clients_per_domain": 3, "unseen_clients_per_domain": 1, "alpha": 0.5}
    module, plain = Numbered(unseen_domains=["b"], pretrain_clients_per_domain=1, **options), Numbered(**options)
    pools = [client.pool for client in module.clients if client.domain == "b"]
    assert pools == ["unseen"] * 4
    kept = [key for client in module.clients if client.domain == "b" for role in ROLES for key in held(client, role)]
    assert len(set(kept)) == len(kept) == 88  # of 90, four equal clients
    without = Numbered(unseen_domains=["b"], **options)
    mine = {client.name: [held(client, role) for role in ROLES] for client in without.clients if client.domain != "b"}
    others = {client.name: [held(client, role) for role in ROLES] for client in plain.clients if client.domain != "b"}
    assert mine == others


def test_nothing_global_is_random() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    Numbered(alpha=0.5, clients_per_domain=3).setup()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"domains": []}, "name at least one"),
        ({"domains": ["a", "a"]}, "each at most once"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"clients_per_domain": 0}, "clients_per_domain is 0"),
        ({"unseen_clients_per_domain": -1}, "unseen_clients_per_domain is -1"),
        ({"pretrain_clients_per_domain": -1}, "pretrain_clients_per_domain is -1"),
        ({"client_size": 1}, "client_size is 1"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments_are_named_at_once(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Numbered(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"domains": ["a", "d"]}, "There is no domain 'd'; the domains are a, b, c"),
        ({"domains": ["a"], "pretrain_domains": ["b"], "pretrain_clients_per_domain": 1}, "There is no domain 'b'"),
        ({"unseen_domains": ["d"]}, "There is no domain 'd'"),
        ({"unseen_domains": ["a", "b", "c"]}, "None of the 3 clients is in the pool 'seen'"),
        ({"unseen_domains": ["a"], "pretrain_domains": ["a"]}, "both have 'a'; a domain is in one of them"),
        ({"clients_per_domain": 100, "domains": ["b"]}, "Domain 'b', pool 'seen': 100 clients are to share 90 samples"),
        ({"clients_per_domain": 2, "client_size": 2}, "Domain 'a', pool 'seen': A client has 2 samples"),
        ({"clients_per_domain": 10, "client_size": 12}, "Domain 'b', pool 'seen': The clients want 120 samples"),
        ({"tests": {"a": 0, "b": 1, "c": 1}}, "The domain 'a' has no samples for testing"),
    ],
)
def test_impossible_demands_name_the_domain(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Numbered(**wrong).setup()
