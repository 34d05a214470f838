"""Clients of a size that was asked for, and clients without skew."""

import numpy as np
import pytest

from datamodules.partition import dirichlet_clients
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
    assert [(len(train), len(val), len(test)) for train, val, test in clients] == [(15, 5, 15)] * 6


def test_more_than_there_is_cannot_be_asked_for() -> None:
    with pytest.raises(DataError, match="want 120 samples together, but there are 100"):
        dirichlet_clients(np.arange(100) % 5, 6, None, rng(), val_fraction=0.25, client_size=20)
