"""The same data every time: global generators are seeded while clients are made, and a hash tells what changed."""

import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from fedl2p.datamodules import ClientData, DigitsDataModule, FederatedDataModule, TensorsDataModule
from fedl2p.datamodules.base import fingerprint


class Drawn(FederatedDataModule):
    """A user's data, drawn from the global generators, as one writes them without thinking of it."""

    num_classes = 2

    def build_clients(self) -> Iterable[ClientData]:
        for number in range(3):
            sets = {
                role: TensorDataset(
                    torch.randn(6, 1, 2, 2) + random.random() + np.random.rand(), torch.randint(2, (6,))
                )
                for role in ("train", "val", "test")
            }
            yield ClientData(name=f"client-{number}", pool="seen", **sets)


class Read(Dataset[Any]):
    """Sample i has the value i, or another one at `changed`; with random noise where that is asked for."""

    def __init__(self, size: int, *, changed: int = -1, noise: float = 0.0) -> None:
        self.size, self.changed, self.noise, self.reads = size, changed, noise, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
        self.reads += 1
        value = float(index if index != self.changed else -1) + self.noise * random.random()
        return {"x": torch.full((2,), value), "name": str(index), "array": np.arange(3)}, index % 2


class Given(FederatedDataModule):
    """One client with a given training set."""

    num_classes = 2

    def __init__(self, train: Dataset[Any], *, pool: str = "seen") -> None:
        super().__init__()
        self.train, self.client_pool = train, pool

    def build_clients(self) -> Iterable[ClientData]:
        rest: dict[str, Any] = {"val": Read(2), "test": Read(2)}
        yield ClientData(name="a", pool=self.client_pool, train=self.train, **rest)
        yield ClientData(name="b", pool="seen", train=Read(2), **rest)


def test_data_from_the_global_generators_are_the_same_on_each_start_and_follow_the_seed() -> None:
    torch.manual_seed(1)
    first = Drawn(seed=5).fingerprint()
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert Drawn(seed=5).fingerprint() == first
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]
    assert not set(Drawn(seed=6).fingerprint().values()) & set(first.values())
    assert list(first) == ["client-0", "client-1", "client-2"] and len(set(first.values())) == 3


def test_states_come_back_after_an_error() -> None:
    class Fails(Drawn):
        def build_clients(self) -> Iterable[ClientData]:
            torch.rand(1)
            raise RuntimeError("no data")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        Fails().setup()
    assert torch.equal(torch.get_rng_state(), state)


def test_other_processes_find_the_same() -> None:
    code = (
        "from fedl2p.datamodules import DigitsDataModule as D;"
        "print(','.join(D(seed=3, seen_clients=6, unseen_clients=6).fingerprint().values()))"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    here = DigitsDataModule(seed=3, seen_clients=6, unseen_clients=6).fingerprint()
    assert found.strip().split(",") == list(here.values())
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in here.values())


def test_every_value_in_memory_counts() -> None:
    def of(change: str = "") -> dict[str, str]:
        inputs = torch.zeros(12, 1, 2, 2)
        labels, clients = np.arange(12) % 2, np.repeat(["a", "b"], 6)
        if change == "input":
            inputs[9, 0, 1, 1] = 1e-6
        if change == "label":
            labels[9] = 0
        mean = [0.5] if change == "mean" else None
        return TensorsDataModule(inputs=inputs, labels=labels, client=clients, num_classes=2, mean=mean).fingerprint()

    assert of()["a"] == of("input")["a"] == of("label")["a"]
    assert len({of()["b"], of("input")["b"], of("label")["b"], of("mean")["b"]}) == 4


def test_sets_that_are_read_are_sampled_and_their_sizes_and_pools_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "MAX_READS", 60)
    large = Read(1000)
    first = Given(large).fingerprint()["a"]
    assert large.reads == 10
    others = [Given(Read(1001)), Given(Read(1000, changed=0)), Given(Read(1000, changed=999))]
    others.append(Given(Read(1000), pool="unseen"))
    assert len({first, *(other.fingerprint()["a"] for other in others)}) == 5
    assert Given(Read(1000)).fingerprint()["a"] == first


def test_random_transforms_do_not_change_it() -> None:
    assert Given(Read(30, noise=1.0)).fingerprint() == Given(Read(30, noise=1.0)).fingerprint()


def test_it_does_not_depend_on_what_was_read_before() -> None:
    data = DigitsDataModule(seen_clients=6, unseen_clients=6)
    before = data.fingerprint()
    list(data.client(3).train_dataloader())
    data.check()
    assert data.fingerprint() == before
