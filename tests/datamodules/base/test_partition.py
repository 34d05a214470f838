"""Dividing labelled data: nothing twice, exact sizes, bounded time, and parts that look like the whole."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedl2p.datamodules.base.partition import (
    dirichlet_partition,
    label_proportions,
    partition_by_proportions,
    stratified_roles,
)
from fedl2p.errors import DataError

quick = settings(deadline=None, derandomize=True, max_examples=60)
alphas = st.sampled_from([0.01, 0.1, 0.5, 5.0, 1000.0])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@quick
@given(
    st.integers(1, 30),
    st.integers(1, 20),
    st.sampled_from([1e-300, 1e-4, 0.01, 0.5, 1000.0, 1e12]),
    st.integers(0, 9),
)
def test_proportions_are_distributions(clients: int, classes: int, alpha: float, seed: int) -> None:
    rows = label_proportions(clients, classes, alpha, rng(seed))
    assert rows.shape == (clients, classes)
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-9)


def test_alpha_goes_from_one_class_to_all() -> None:
    assert label_proportions(200, 10, 0.01, rng()).max(axis=1).mean() > 0.9
    assert label_proportions(200, 10, 1000.0, rng()).max() < 0.15
    assert label_proportions(200, 10, 1e-300, rng()).max(axis=1).min() == 1
    # Underflowing rows must not all fall on one class.
    assert len(np.unique(label_proportions(200, 10, 1e-300, rng()).argmax(axis=1))) == 10


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(DataError, match="alpha"):
        label_proportions(2, 2, alpha, rng())


def test_proportions_need_clients_and_classes() -> None:
    with pytest.raises(DataError, match="at least 1"):
        label_proportions(0, 2, 1.0, rng())


@quick
@given(st.data(), st.integers(1, 12), st.integers(1, 8), alphas, st.integers(0, 99))
def test_sizes_are_exact_and_nothing_is_dealt_twice(
    data: st.DataObject, clients: int, classes: int, alpha: float, seed: int
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=clients, max_size=clients))
    spare = data.draw(st.integers(0, 10))  # 0: the supply is used up to the last sample
    labels = rng(seed).integers(classes, size=sum(sizes) + spare)
    parts = dirichlet_partition(labels, sizes, alpha, rng(seed))
    assert [len(part) for part in parts] == sizes
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0 and together.max() < len(labels)


@quick
@given(st.integers(1, 40), st.integers(1, 10), alphas, st.integers(0, 99))
def test_proportions_are_met_to_rounding_where_the_supply_is_ample(
    size: int, classes: int, alpha: float, seed: int
) -> None:
    wanted = label_proportions(5, classes, alpha, rng(seed))
    labels = np.repeat(np.arange(classes), 5 * size)
    for part, row in zip(partition_by_proportions(labels, wanted, [size] * 5, rng(seed)), wanted, strict=True):
        assert (np.abs(np.bincount(labels[part], minlength=classes) - size * row) < 1).all()


def test_the_largest_fractions_are_rounded_up() -> None:
    labels = np.repeat([0, 1, 2], 20)
    (part,) = partition_by_proportions(labels, [[0.66, 0.25, 0.09]], [10], rng())
    assert np.bincount(labels[part]).tolist() == [7, 2, 1]


def test_a_class_that_runs_out_is_replaced_in_proportion() -> None:
    labels = np.repeat([0, 1, 2, 3], [4, 100, 100, 100])
    (part,) = partition_by_proportions(labels, [[0.5, 0.2, 0.3, 0.0]], [24], rng())
    assert np.bincount(labels[part], minlength=4).tolist() == [4, 8, 12, 0]


def test_other_classes_fill_up_when_all_of_a_clients_own_run_out() -> None:
    labels = np.repeat([0, 1, 2], [4, 10, 30])
    (part,) = partition_by_proportions(labels, [[1.0, 0.0, 0.0]], [12], rng())
    assert np.bincount(labels[part], minlength=3).tolist() == [4, 2, 6]


def test_no_client_is_always_served_last() -> None:
    labels = np.repeat([0, 1], [10, 90])
    lucky = set()
    for seed in range(20):
        parts = partition_by_proportions(labels, [[1, 0]] * 5, [10] * 5, rng(seed))
        lucky.add(int(np.argmax([(labels[part] == 0).sum() for part in parts])))
    assert len(lucky) >= 4


def test_the_generator_alone_decides() -> None:
    labels = rng().integers(10, size=500)
    first, again, other = (dirichlet_partition(labels, [20] * 10, 0.5, rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("alpha", [0.01, 1000.0])
def test_time_is_bounded_when_everything_is_dealt(alpha: float) -> None:
    labels = rng().integers(100, size=50_000)
    start = time.perf_counter()
    parts = dirichlet_partition(labels, [50] * 1000, alpha, rng())
    assert time.perf_counter() - start < 2
    assert len(np.unique(np.concatenate(parts))) == 50_000


@pytest.mark.parametrize(
    ("labels", "proportions", "sizes", "message"),
    [
        ([0, 1, 1], [[1, 1]], [4], "want 4 samples together, but there are 3"),
        ([0, 1, 1], [[1, 1]], [0], "at least 1"),
        ([0, 1, 2], [[1, 1]], [2], "label 2"),
        ([0, 1, 1], [[0, 0]], [2], "not all 0"),
        ([0, 1, 1], [[1, -1]], [2], "numbers from 0"),
        ([0, 1, 1], [[1, float("nan")]], [2], "numbers from 0"),
        ([0, 1, 1], [[1, 1]], [1, 1], "shape"),
        ([], [[1, 1]], [1], "non-empty"),
        ([0.5, 1.0], [[1, 1]], [1], "whole numbers"),
        ([-1, 1], [[1, 1]], [1], "whole numbers from 0"),
    ],
)
def test_impossible_demands_are_named(labels: list, proportions: list, sizes: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition_by_proportions(labels, proportions, sizes, rng())


@quick
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    st.integers(0, 99),
)
def test_roles_are_disjoint_and_each_class_is_divided_to_rounding(
    class_sizes: list[int], ratio: list[int], seed: int
) -> None:
    labels = rng(seed).permutation(np.repeat(np.arange(len(class_sizes)), class_sizes))
    fractions = [part / sum(ratio) for part in ratio]
    roles = stratified_roles(labels, fractions, rng(seed))
    together = np.concatenate(roles)
    assert sorted(together.tolist()) == list(range(len(labels)))
    for role, fraction in zip(roles, fractions, strict=True):
        counts = np.bincount(labels[role], minlength=len(class_sizes))
        assert (np.abs(counts - fraction * np.array(class_sizes)) < 1).all()


def test_roles_keep_to_the_fractions_in_total_when_classes_are_tiny() -> None:
    labels = np.arange(100)  # one sample a class
    assert [len(role) for role in stratified_roles(labels, (0.6, 0.15, 0.25), rng())] == [60, 15, 25]


def test_roles_may_leave_samples_out() -> None:
    labels = np.repeat([0, 1], 50)
    assert [len(role) for role in stratified_roles(labels, (0.2, 0.1), rng())] == [20, 10]


@pytest.mark.parametrize("fractions", [(0.6, 0.6), (-0.1, 0.5), (float("nan"),)])
def test_fractions_must_fit(fractions: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="at most 1"):
        stratified_roles([0, 1], fractions, rng())
