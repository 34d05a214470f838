"""Intervals, sparsity, clusters and distance maps, against values worked out by hand or by definition."""

import math

import numpy as np
import pytest

from fedl2p.errors import DataError
from fedl2p.report.analysis import cluster_agreement, cluster_distance_map, paired_bootstrap, sparsity, spread


def test_bootstrap_interval_is_near_the_normal_one() -> None:
    differences = np.random.default_rng(0).normal(0.05, 0.1, 200)
    mean, low, high = paired_bootstrap(differences)
    half = 1.96 * differences.std() / math.sqrt(200)
    assert mean == pytest.approx(differences.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_bootstrap_follows_its_seed_and_confidence() -> None:
    differences = np.random.default_rng(1).normal(size=30)
    assert paired_bootstrap(differences, seed=3) == paired_bootstrap(differences, seed=3)
    assert paired_bootstrap(differences, seed=3) != paired_bootstrap(differences, seed=4)
    _, low, high = paired_bootstrap(differences, confidence=0.99)
    _, inner_low, inner_high = paired_bootstrap(differences, confidence=0.5)
    assert low < inner_low < inner_high < high


def test_bootstrap_of_equal_differences_has_no_width() -> None:
    assert paired_bootstrap([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)


def test_bootstrap_of_one_client_has_no_interval() -> None:
    mean, low, high = paired_bootstrap([0.25])
    assert mean == 0.25
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize("differences", [[], [0.1, math.nan], [math.inf]])
def test_bootstrap_of_nothing_finite_is_an_error(differences: list[float]) -> None:
    with pytest.raises(DataError, match="paired differences"):
        paired_bootstrap(differences)


def test_sparsity_counts_exact_zeros_only() -> None:
    assert sparsity([0.0, -0.0, 1e-300, -0.1]) == 0.5
    assert sparsity([[0.0, 0.1], [0.0, 0.0]]) == 0.75
    assert sparsity(0.0) == 1.0


def test_sparsity_by_size_is_the_share_of_the_models_values() -> None:
    assert sparsity([0.0, 0.1], sizes=[90, 10]) == pytest.approx(0.9)
    assert sparsity([[0.0, 0.1], [0.0, 0.0]], sizes=[90, 10]) == pytest.approx(0.95)


@pytest.mark.parametrize(("eta", "sizes"), [([], None), ([0.1, 0.2], [1]), ([0.1], [])])
def test_sparsity_of_what_does_not_fit_is_an_error(eta: list[float], sizes: list[int] | None) -> None:
    with pytest.raises(DataError, match="eta has the shape"):
        sparsity(eta, sizes=sizes)


def test_spread_by_hand() -> None:
    assert spread([1, 2, 3, 6]) == {
        "mean": 3.0,
        "sd": pytest.approx(math.sqrt(14 / 4)),
        "median": 2.5,
        "min": 1.0,
        "max": 6.0,
    }
    assert spread([0.5])["sd"] == 0.0


def test_spread_never_hides_what_is_not_a_number() -> None:
    for values in ([], [0.5, math.nan]):
        found = spread(values)
        assert list(found) == ["mean", "sd", "median", "min", "max"]
        assert all(math.isnan(value) for value in found.values())
    infinite = spread([1.0, 2.0, math.inf])
    assert (infinite["mean"], infinite["median"]) == (math.inf, 2.0)
    assert math.isnan(infinite["sd"])


DOMAINS = [name for name in "abc" for _ in range(6)]


def groups(distance: float, scale: float = 1.0) -> np.ndarray:
    """18 clients in 3 domains whose centres are `distance` apart, with noise of size 1."""
    centres = distance * np.repeat(np.eye(3, 5), 6, axis=0)
    return scale * (centres + np.random.default_rng(0).normal(size=(18, 5)))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_clusters_agree_with_domains_that_lie_apart_whatever_the_unit(scale: float) -> None:
    assert cluster_agreement(groups(30, scale), DOMAINS, 0) == pytest.approx(1.0)


def test_clusters_of_noise_do_not_agree() -> None:
    agreements = [cluster_agreement(np.random.default_rng(s).normal(size=(18, 5)), DOMAINS, s) for s in range(10)]
    assert abs(float(np.mean(agreements))) < 0.15


def test_clusters_of_equal_clients_say_nothing() -> None:
    assert cluster_agreement(np.ones((18, 4)), DOMAINS, 0) == 0.0


def test_clusters_are_undefined_for_one_domain_or_too_few_clients() -> None:
    assert math.isnan(cluster_agreement(groups(1), ["a"] * 18, 0))
    assert math.isnan(cluster_agreement(np.eye(3), ["a", "b", "c"], 0))


@pytest.mark.parametrize("features", [np.ones((17, 4)), np.full((18, 4), np.nan), np.ones(18)])
def test_features_that_do_not_fit_are_an_error(features: np.ndarray) -> None:
    with pytest.raises(DataError, match="18 clients"):
        cluster_agreement(features, DOMAINS, 0)
    with pytest.raises(DataError, match="18 clients"):
        cluster_distance_map(features, DOMAINS)


def test_distance_map_by_hand() -> None:
    # Within b: 1; within a: 4; between: |0-9|, |0-10|, |4-9|, |4-10|, mean 7.5.
    names, matrix = cluster_distance_map([[9.0], [0.0], [10.0], [4.0]], ["b", "a", "b", "a"])
    assert names == ["a", "b"]
    off = math.log(7.5 / math.sqrt(4 * 1))
    np.testing.assert_allclose(matrix, [[0, off], [off, 0]], atol=1e-12)


def test_distance_map_is_near_zero_where_domains_do_not_matter() -> None:
    _, apart = cluster_distance_map(groups(30), DOMAINS)
    _, mixed = cluster_distance_map(np.random.default_rng(3).normal(size=(18, 5)), DOMAINS)
    off = ~np.eye(3, dtype=bool)
    assert (apart[off] > 1.5).all()
    assert (np.abs(mixed[off]) < 0.3).all()


def test_distance_map_of_a_single_client_is_nan() -> None:
    names, matrix = cluster_distance_map([[0.0], [1.0], [5.0]], ["a", "a", "b"])
    assert names == ["a", "b"]
    assert matrix[0, 0] == 0
    assert np.isnan([matrix[0, 1], matrix[1, 0], matrix[1, 1]]).all()


def test_distance_map_of_equal_clients_is_infinite_outside() -> None:
    _, matrix = cluster_distance_map([[0.0], [0.0], [5.0], [6.0]], ["a", "a", "b", "b"])
    assert math.isnan(matrix[0, 0])
    assert matrix[0, 1] == math.inf
