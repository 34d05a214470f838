"""CIFAR-10-C: published files, computed corruptions, and one role for an image in all domains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_round import run_one_round
from tiny_data import cifar10 as tiny_cifar10
from tiny_data import cifar10c as tiny

from fedl2p.datamodules import CIFAR10CDataModule
from fedl2p.datamodules.cifar10c import CORRUPTIONS
from fedl2p.datamodules.corruptions.cifar10 import COMPUTED, corrupt
from fedl2p.errors import DataError

SMALL: dict[str, Any] = {"domains": tiny.NAMES, "clients_per_domain": 2, "unseen_clients_per_domain": 1}


def module(root: Path, **options: Any) -> CIFAR10CDataModule:
    tiny.write(root)
    return CIFAR10CDataModule(root, **(SMALL | options))


def numbers(data: CIFAR10CDataModule, client_id: int, role: str) -> set[int]:
    """Which underlying images a client has: the second value of the first pixel says it."""
    dataset = getattr(data.clients[client_id], role)
    return {int(image[1, 0, 0]) for image in dataset.arrays.inputs[dataset.rows]}


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_the_block_of_the_severity_is_read(tmp_path: Path, severity: int) -> None:
    data = module(tmp_path, severity=severity)
    values = {int(image[0, 0, 0]) for image in data.clients[0].train.arrays.inputs}
    assert values == {severity}


def test_an_underlying_image_has_one_pool_and_is_tested_on_or_never(tmp_path: Path) -> None:
    data = module(tmp_path)
    assert {client.domain for client in data.clients} == set(tiny.NAMES)
    found = {
        (pool, role): set().union(*(numbers(data, i, r) for i in data.pool(pool) for r in roles))
        for pool in ("seen", "unseen")
        for role, roles in {"learn": ("train", "val"), "test": ("test",)}.items()
    }
    groups = list(found.values())
    assert sum(map(len, groups)) == len(set().union(*groups)) == 60
    assert len(found["seen", "test"] | found["unseen", "test"]) == 12


def test_domains_deal_their_images_differently(tmp_path: Path) -> None:
    data = module(tmp_path, clients_per_domain=4, unseen_clients_per_domain=0, alpha=1.0)
    frost, fog = ([i for i in data.pool("seen") if data.clients[i].domain == name] for name in tiny.NAMES)
    assert any(numbers(data, a, "train") != numbers(data, b, "train") for a, b in zip(frost, fog, strict=True))


def test_missing_frost_says_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"frost\.npy is missing.*zenodo.*leave frost out"):
        CIFAR10CDataModule(tmp_path).prepare_data()


def test_a_missing_corruption_needs_the_clean_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="CIFAR-10 is not there"):
        CIFAR10CDataModule(tmp_path, cifar10_root=tmp_path / "clean", domains=["fog"]).prepare_data()


def test_broken_files_are_named(tmp_path: Path) -> None:
    data = module(tmp_path)
    np.save(tmp_path / "fog.npy", np.zeros((7, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"fog\.npy holds uint8 of shape \(7, 32, 32, 3\), and there are 300 labels"):
        data.setup()
    (tmp_path / "frost.npy").write_bytes(b"no array")
    again = CIFAR10CDataModule(tmp_path, **SMALL)
    with pytest.raises(DataError, match=r"frost\.npy cannot be read"):
        again.setup()


@pytest.mark.parametrize("options", [{"severity": 0}, {"severity": 6}, {"alpha": 0}, {"domains": ["fog", "fog"]}])
def test_impossible_arguments_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        CIFAR10CDataModule(tmp_path, **options)


# Computed corruptions


def test_all_but_frost_are_computed() -> None:
    assert set(CORRUPTIONS) - set(COMPUTED) == {"frost"}
    assert set(COMPUTED) < set(CORRUPTIONS)


def ramp(count: int = 3) -> np.ndarray:
    """Smooth images with some colour, none of them at the ends of the range."""
    rows = np.linspace(60, 180, 32)
    image = np.stack([np.tile(rows, (32, 1)), np.tile(rows[:, None], (1, 32)), np.full((32, 32), 120)], axis=-1)
    return np.stack([np.roll(image, 5 * i, axis=0) for i in range(count)]).astype(np.uint8)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_corruption_changes_images_more_at_a_higher_severity_and_repeats(name: str) -> None:
    images = ramp()
    changes = []
    for severity in (3, 5):
        changed = corrupt(images, name, severity, np.random.default_rng(0))
        assert changed.shape == images.shape
        assert changed.dtype == np.uint8
        changes.append(np.abs(changed.astype(int) - images).mean())
    assert 0 < changes[0] < changes[1]
    again = corrupt(images, name, 5, np.random.default_rng(0))
    assert np.array_equal(again, changed)


def test_contrast_and_brightness_by_hand() -> None:
    image = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    image[:, :16] = 100
    low = corrupt(image, "contrast", 3, np.random.default_rng(0))
    assert {*low[0, :16].ravel(), *low[0, 16:].ravel()} == {30, 70}  # 50 -+ 0.4 * 50
    bright = corrupt(image, "brightness", 3, np.random.default_rng(0))
    assert set(bright.ravel()) <= {138, 137, 38, 39}  # + 0.15 * 255 in value


def test_blur_keeps_what_does_not_vary_and_smears_in_one_direction() -> None:
    flat = np.full((2, 32, 32, 3), 77, dtype=np.uint8)
    assert np.abs(corrupt(flat, "motion_blur", 3, np.random.default_rng(0)).astype(int) - 77).max() <= 1
    point = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    point[0, 16, 16] = 255
    smeared = corrupt(point, "motion_blur", 5, np.random.default_rng(0))[0, :, :, 0]
    assert 230 <= smeared.sum() <= 256
    assert 2 <= (smeared > 0).sum() <= 19


def test_one_can_train_on_it(tmp_path: Path) -> None:
    tiny.write(tmp_path / "c")
    options = {"root": str(tmp_path / "c"), **SMALL, "domains": list(tiny.NAMES)}
    methods = run_one_round("fedl2p.datamodules.CIFAR10CDataModule", options, tmp_path / "run", in_channels=3)
    assert "unseen" in methods["fedl2p"]


def test_one_can_train_on_computed_corruptions(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    tiny_cifar10.write_jpeg(tmp_path / "clean" / "cifar10_jpeg.npz")
    options = {
        "root": str(tmp_path / "none"),
        "cifar10_root": str(tmp_path / "clean"),
        "domains": ["fog", "pixelate"],
        "clients_per_domain": 1,
    }
    assert run_one_round("fedl2p.datamodules.CIFAR10CDataModule", options, tmp_path / "run", in_channels=3)


@pytest.mark.slow
def test_one_can_train_on_the_real_images(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    options = {
        "root": str(tmp_path / "none"),
        "cifar10_root": str(shared_data("cifar10")),
        "domains": ["contrast", "fog"],
        "clients_per_domain": 2,
        "client_size": 60,
    }
    assert run_one_round("fedl2p.datamodules.CIFAR10CDataModule", options, tmp_path / "run", in_channels=3)
