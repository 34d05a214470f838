"""Whole clients: nothing lost, nothing twice, the same labels in every role; sizes that were asked for; no skew."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedl2p.datamodules.base.partition import client_roles, dirichlet_clients
from fedl2p.errors import DataError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_no_alpha_gives_every_client_the_labels_of_the_whole() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 90])
    for train, val, test in dirichlet_clients(labels, 9, None, rng(), val_fraction=0.2, test_fraction=0.2):
        held = np.bincount(labels[np.concatenate([train, val, test])], minlength=3)
        assert (np.abs(held - [66.7, 33.3, 10]) < 1).all() and held.sum() == 110


def test_a_large_alpha_asks_for_even_classes_which_the_supply_may_not_have() -> None:
    labels = np.repeat([0, 1], [900, 100])
    parts = [np.concatenate(p) for p in dirichlet_clients(labels, 10, 1e6, rng(), val_fraction=0.2, test_fraction=0.2)]
    assert sorted(int(labels[part].sum()) for part in parts)[-2:] == [50, 50]


@pytest.mark.parametrize("alpha", [None, 0.1])
def test_clients_have_the_size_that_was_asked_for(alpha: float | None) -> None:
    labels, test_labels = rng().integers(5, size=400), rng(1).integers(5, size=90)
    clients = dirichlet_clients(labels, 6, alpha, rng(), val_fraction=0.25, test_labels=test_labels, client_size=20)
    together = np.concatenate([np.concatenate([train, val]) for train, val, _ in clients])
    assert len(np.unique(together)) == len(together) == 120
    assert [(len(train), len(val)) for train, val, _ in clients] == [(15, 5)] * 6
    assert len({len(test) for _, _, test in clients}) == 1 and 1 <= len(clients[0][2]) <= 15
    together = np.concatenate([test for _, _, test in clients])
    assert len(np.unique(together)) == len(together)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.sampled_from([None, 0.01, 0.1, 1.0, 1000.0]), st.integers(1, 30), st.integers(4, 60), st.integers(0, 99))
def test_small_clients_are_tested_on_the_labels_that_they_train_on(
    alpha: float | None, clients: int, size: int, seed: int
) -> None:
    labels, test_labels = rng(seed).integers(10, size=5000), rng(seed + 1).integers(10, size=1000)
    found = dirichlet_clients(
        labels, clients, alpha, rng(seed), val_fraction=0.2, test_labels=test_labels, client_size=size
    )
    for train, _, test in found:
        trained = np.bincount(labels[train], minlength=10) / len(train)
        tested = np.bincount(test_labels[test], minlength=10)
        assert (np.abs(tested - trained * len(test)) < 1).all()
        assert tested[trained == 0].sum() == 0
    assert len(found[0][2]) >= min(1000 // clients, size * 1000 // 5000 // 2)


def test_a_class_that_is_not_in_the_test_supply_does_not_leave_clients_without_a_test() -> None:
    labels, test_labels = np.arange(500) % 5, np.arange(100) % 4
    found = dirichlet_clients(labels, 4, None, rng(), val_fraction=0.2, test_labels=test_labels, client_size=50)
    assert {len(test) for _, _, test in found} == {10}


def test_more_than_there_is_cannot_be_asked_for() -> None:
    with pytest.raises(DataError, match="want 120 samples together, but there are 100"):
        dirichlet_clients(np.arange(100) % 5, 6, None, rng(), val_fraction=0.25, client_size=20)


quick = settings(deadline=None, derandomize=True, max_examples=60)


@quick
@given(
    st.integers(1, 15),
    st.integers(3, 30),
    st.integers(1, 8),
    st.sampled_from([None, 0.01, 0.1, 1.0, 1000.0]),
    st.integers(0, 99),
)
def test_every_sample_is_in_one_role_of_one_client(
    clients: int, size: int, classes: int, alpha: float | None, seed: int
) -> None:
    labels = rng(seed).integers(classes, size=clients * size)
    found = dirichlet_clients(labels, clients, alpha, rng(seed), val_fraction=0.2, test_fraction=0.2)
    together = np.concatenate([np.concatenate(parts) for parts in found])
    assert sorted(together.tolist()) == list(range(len(labels)))
    assert {sum(map(len, parts)) for parts in found} == {size}
    assert all(len(part) >= 1 for parts in found for part in parts)
    again = dirichlet_clients(labels, clients, alpha, rng(seed), val_fraction=0.2, test_fraction=0.2)
    assert all(np.array_equal(a, b) for x, y in zip(found, again, strict=True) for a, b in zip(x, y, strict=True))


@quick
@given(st.lists(st.integers(0, 6), min_size=3, max_size=80), st.integers(0, 99))
def test_a_client_has_the_same_labels_in_every_role(own: list[int], seed: int) -> None:
    labels = np.array(own)
    parts = client_roles(labels, 0.2, 0.2, rng(seed))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    train, val, test = (np.bincount(labels[part], minlength=7) for part in parts)
    assert val.sum() >= 1 and test.sum() >= 1 and train.sum() >= 1
    counts = np.bincount(labels, minlength=7)
    for role in (train, val, test):
        assert (np.abs(role - counts * role.sum() / len(labels)) <= 1.5).all()


@pytest.mark.parametrize("alpha", [0.01, 1000.0])
def test_time_is_bounded_for_many_clients(alpha: float) -> None:
    labels, test_labels = np.arange(50_000) % 10, np.arange(10_000) % 10
    started = time.perf_counter()
    dirichlet_clients(labels, 1000, alpha, rng(), val_fraction=0.2, test_labels=test_labels)
    assert time.perf_counter() - started < 2


def test_fewer_samples_than_clients_is_an_error() -> None:
    with pytest.raises(DataError, match="5 clients are to share 4 samples"):
        dirichlet_clients(np.zeros(4, dtype=int), 5, 1.0, rng(), val_fraction=0.2, test_fraction=0.2)
