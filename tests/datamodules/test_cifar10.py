"""CIFAR-10: the published batches, JPEG bytes, and its division among clients."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_round import run_one_round
from tiny_data import cifar10 as tiny
from torchvision.datasets import CIFAR10

from fedl2p.datamodules import CIFAR10DataModule
from fedl2p.datamodules.base.arrays import labels_of
from fedl2p.datamodules.cifar10 import read_cifar10
from fedl2p.errors import DataError


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sums = tiny.write(tmp_path)
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return tmp_path


def module(root: Path, **options: Any) -> CIFAR10DataModule:
    settings: dict[str, Any] = {"seen_clients": 6, "unseen_clients": 2, "pretrain_clients": 2, "alpha": 0.5}
    return CIFAR10DataModule(root, **(settings | options))


def test_the_published_batches_are_read_in_order(batches: Path) -> None:
    splits = read_cifar10(batches)
    expected, labels = tiny.images(100, 0)
    assert np.array_equal(splits["test"][0], expected.transpose(0, 2, 3, 1))
    assert np.array_equal(splits["test"][1], labels)
    assert splits["train"][0].shape == (200, 32, 32, 3)


def test_every_image_belongs_to_one_client_and_test_images_are_the_published_ones(batches: Path) -> None:
    data = module(batches)
    assert [len(data.pool(pool)) for pool in ("pretrain", "seen", "unseen")] == [2, 6, 2]
    assert {data.client_sizes(i) for i in range(10)} == {(16, 4, 10)}
    seen = [bytes(client.test.arrays.inputs[row].numpy()) for client in data.clients for row in client.test.rows]
    published = {bytes(image) for image in tiny.images(100, 0)[0]}
    assert len(set(seen)) == 100
    assert set(seen) == published


def test_clients_may_be_cut_from_the_published_test_images(batches: Path) -> None:
    data = module(batches, published="test", test_fraction=0.3)
    assert {data.client_sizes(i) for i in range(10)} == {(6, 1, 3)}
    inputs = data.clients[0].train.arrays.inputs.numpy()  # type: ignore[attr-defined]
    assert {bytes(image) for image in inputs} == {bytes(image) for image in tiny.images(100, 0)[0]}
    with pytest.raises(DataError, match="published is 'val'; it must be 'train' or 'test'"):
        module(batches, published="val")


def test_small_clients_are_tested_on_what_they_train_on(batches: Path) -> None:
    data = module(batches, client_size=10, alpha=0.1)
    for client in data.clients:
        assert set(labels_of(client.test)) <= set(labels_of(client.train))


def test_the_old_name_of_a_size_still_works(batches: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert {sum(module(batches, samples_per_client=10).client_sizes(i)[:2]) for i in range(10)} == {10}
    assert "samples_per_client is now called client_size" in caplog.text


def test_a_client_has_its_labels_in_every_role(batches: Path) -> None:
    data = module(batches, seen_clients=4, unseen_clients=0, pretrain_clients=0)
    for client in data.clients:
        train, val, test = (np.bincount(labels_of(getattr(client, r)), minlength=10) for r in ("train", "val", "test"))
        held = train + val
        assert np.abs(test - held * test.sum() / held.sum()).max() < 1
        assert np.abs(val - held * 0.2).max() <= 1


def test_inputs_are_normalized_by_channel(batches: Path) -> None:
    data = module(batches)
    inputs, _ = data.clients[0].train[list(range(3))]
    raw = data.clients[0].train.arrays.inputs[data.clients[0].train.rows[:3]] / 255
    expected = (raw - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
    torch.testing.assert_close(inputs, expected)


def test_augmentation_is_for_training_batches_alone(batches: Path) -> None:
    data = module(batches, augment=True).client(2, seed=3)
    plain = module(batches).client(2, seed=3)
    pairs = zip(data.train_dataloader(), plain.train_dataloader(), strict=True)
    assert not any(torch.equal(a[0], b[0]) for a, b in pairs)
    for name in ("statistics_dataloader", "val_dataloader", "test_dataloader"):
        pairs = zip(getattr(data, name)(), getattr(plain, name)(), strict=True)
        assert all(torch.equal(a[0], b[0]) for a, b in pairs)


def test_a_thousand_clients_are_dealt_in_two_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    splits = {
        name: (np.zeros((count, 1, 1, 3), dtype=np.uint8), rng.permutation(np.arange(count) % 10))
        for name, count in (("train", 50_000), ("test", 10_000))
    }
    monkeypatch.setattr("fedl2p.datamodules.cifar10.read_cifar10", lambda root: splits)
    data = CIFAR10DataModule(tmp_path, alpha=0.1)
    data._chosen_domains()
    started = time.perf_counter()
    plans = data._plans()
    assert time.perf_counter() - started < 2
    assert len(plans) == 1000
    assert {tuple(len(plan.sets[role]) for role in ("train", "val", "test")) for plan in plans} == {(40, 10, 10)}


def test_missing_files_say_what_to_get_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-10-batches-py is missing.*download.*cifar-10-python\.tar\.gz"):
        module(tmp_path / "nowhere").prepare_data()


@pytest.mark.parametrize("damage", ["cut", "key", "image"])
def test_broken_jpeg_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cifar10_jpeg.npz"
    tiny.write_jpeg(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-400])
    else:
        with np.load(path) as file:
            content = dict(file)
        if damage == "key":
            del content["offsets"]
        else:
            content["jpeg"][:200] = 0
        np.savez(path, **content)
    with pytest.raises(DataError, match=r"cifar10_jpeg\.npz"):
        module(tmp_path).setup()


def test_batches_with_other_sums_are_not_unpickled(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    with pytest.raises(DataError, match="CIFAR-10 is not there"):
        module(tmp_path).prepare_data()


def test_one_can_train_on_it(batches: Path, tmp_path: Path) -> None:
    options = {"root": str(batches), "seen_clients": 3, "unseen_clients": 1, "samples_per_client": 10}
    assert "fedl2p" in run_one_round("fedl2p.datamodules.CIFAR10DataModule", options, tmp_path / "run", in_channels=3)


@pytest.mark.slow
def test_one_can_train_on_the_real_images(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"root": str(shared_data("cifar10")), "seen_clients": 6, "unseen_clients": 2, "samples_per_client": 50}
    methods = run_one_round("fedl2p.datamodules.CIFAR10DataModule", options, tmp_path / "run", in_channels=3)
    assert len(methods["fedl2p"]["seen"]["clients"]) == 6
