"""Seeds that follow from what is seeded."""

import numpy as np
import pytest

from fedl2p.seeding import derive_seed


def test_the_same_parts_give_the_same_seed_in_every_process() -> None:
    # A fixed number: hash() would differ from process to process.
    assert derive_seed(0, "meta", 1, 2) == derive_seed(0, "meta", 1, 2) == 140637670


def test_different_parts_give_different_seeds() -> None:
    parts = [
        (0, "meta", 1, 2),
        (0, "meta", 2, 1),
        (1, "meta", 1, 2),
        (0, "l2p", 1, 2),
        (0, "meta", 12),
        (0, 1, "meta", 2),
    ]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert len({derive_seed(0, "x", i) for i in range(2000)}) == 2000


def test_seeds_are_below_two_to_the_31() -> None:
    seeds = [derive_seed(i, "word") for i in range(500)]
    assert min(seeds) >= 0
    assert 2**30 < max(seeds) < 2**31


def test_large_seeds_are_taken() -> None:
    assert 0 <= derive_seed(10**30, "word") < 2**31


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        derive_seed(-1)


def test_the_global_random_state_is_left_alone() -> None:
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    derive_seed(5, "word")
    assert np.random.rand() == expected
