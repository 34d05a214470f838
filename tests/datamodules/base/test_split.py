"""One vocabulary for all data sets: what each takes, which values are refused, and a new data set in few lines."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedl2p import datamodules
from fedl2p.datamodules import FederatedDataModule, Split
from fedl2p.datamodules.base.domains import Domain, DomainsDataModule, Samples
from fedl2p.errors import DataError

MODULES = [
    getattr(datamodules, name)
    for name in datamodules.__all__
    if name.endswith("DataModule") and name not in ("ClientDataModule", "FederatedDataModule")
]
WORDS = {word.name for word in fields(Split)}


class Stars(DomainsDataModule):
    """A new data set: two telescopes, three kinds of stars."""

    num_classes = 3
    domain_names = ("north", "south")
    split = Split(alpha=1.0, clients_per_domain=4)

    def __init__(self, brightness: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.brightness = brightness

    def find(self) -> Iterable[Domain]:
        for name in self.domain_names:
            yield Domain(name, Samples(list(range(60)), np.arange(60) % 3))

    def read(self, keys: Sequence[int]) -> Tensor:
        return self.brightness * torch.tensor(keys, dtype=torch.float32).reshape(-1, 1, 1, 1)


def test_a_new_data_set_takes_the_words_of_its_base_with_defaults_of_its_own() -> None:
    stars = Stars(unseen_clients_per_domain=1, seed=3)
    assert [len(stars.pool(pool)) for pool in ("seen", "unseen")] == [8, 2]
    assert (stars.seed, stars.split.alpha, stars.split.clients_per_domain) == (3, 1.0, 4)
    assert Stars.split == Split(alpha=1.0, clients_per_domain=4)
    assert len(Stars(domains=["south"], clients_per_domain=2).clients) == 2


def test_the_words_are_attributes_too() -> None:
    stars = Stars(alpha=0.3)
    assert (stars.alpha, stars.val_fraction, stars.domains) == (0.3, 0.2, ("north", "south"))  # type: ignore[attr-defined]


def test_an_unknown_argument_is_refused_with_what_is_known() -> None:
    with pytest.raises(
        DataError, match="Stars takes no 'alhpa'; it takes brightness, domains, batch_size, seed, alpha"
    ):
        Stars(alhpa=0.5)
    with pytest.raises(DataError, match="takes no 'seen_clients'"):
        Stars(seen_clients=5)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_signature_names_all_that_a_data_set_takes(module: type[FederatedDataModule]) -> None:
    parameters = inspect.signature(module).parameters
    assert {"batch_size", "seed", *module.split_keys} <= set(parameters)
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    assert set(parameters) & WORDS <= {*module.split_keys, "domains"}
    for name in set(module.split_keys) - {"domains"}:
        assert parameters[name].default == getattr(module.split, name)


def test_the_signature_has_the_arguments_of_all_constructors() -> None:
    class Mine(datamodules.DigitsDataModule):
        def __init__(self, depth: int = 3, **options: Any) -> None:
            super().__init__(**options)

    assert list(inspect.signature(Mine).parameters)[:4] == ["depth", "domains", "train_sizes", "batch_size"]
    assert Mine(domains=["blur"]).domains == ("blur",)


def test_the_signature_of_a_users_own_constructor_is_left_alone() -> None:
    class Mine(FederatedDataModule):
        def __init__(self, *files: str, depth: int = 3) -> None:
            super().__init__()

    assert list(inspect.signature(Mine).parameters) == ["files", "depth"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 1.5}, "seed is 1.5; it must be at least 0, a whole number"),
        ({"seed": None}, "seed is None"),
        ({"seen_clients": True}, "seen_clients is True"),
        ({"seen_clients": "abc"}, "seen_clients is 'abc'"),
        ({"client_size": 1}, "client_size is 1; it must be at least 2"),
        ({"min_samples": 2}, "min_samples is 2; it must be at least 3"),
        ({"alpha": "abc"}, "alpha is 'abc'; it must be a positive number, or None"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": -1}, "alpha is -1"),
        ({"val_fraction": 1}, "val_fraction is 1; it must be above 0 and below 1"),
        ({"test_fraction": None}, "test_fraction is None"),
        ({"unseen_fraction": -0.5}, "unseen_fraction is -0.5; it must be from 0 and below 1"),
        ({"unseen_fraction": 0.5, "pretrain_fraction": 0.5}, "together below 1"),
        ({"domains": []}, "domains is .*; name at least one"),
        ({"pretrain_domains": ["a", "a"]}, "pretrain_domains is .* each at most once"),
    ],
)
def test_every_word_has_its_bounds(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Split(**wrong)


def test_a_single_domain_may_be_a_word_and_numbers_may_be_numpys() -> None:
    split = Split(domains="north", seen_clients=np.int64(3), alpha=np.float32(0.5), client_size=None)  # type: ignore[arg-type]
    assert split.domains == ("north",) and split.seen_clients == 3
    assert Split(val_fraction=0.25, test_fraction=0.2).val_share == pytest.approx(0.2)
