"""Office-Caltech-10 in the layouts of those who publish it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_round import run_one_round
from tiny_data import office_caltech10
from tiny_data.images import write_image

from fedl2p.datamodules import OfficeCaltech10DataModule
from fedl2p.datamodules.base.arrays import labels_of
from fedl2p.datamodules.office_caltech10 import CLASSES
from fedl2p.errors import DataError

OFFICE31 = {"backpack": "back_pack", "laptop": "laptop_computer"}
CALTECH256 = (
    "003.backpack",
    "224.touring-bike",
    "027.calculator",
    "101.head-phones",
    "045.computer-keyboard",
    "127.laptop-101",
    "046.computer-monitor",
    "047.computer-mouse",
    "041.coffee-mug",
    "238.video-projector",
)
"""Folders of Caltech-256; of its two kinds of bikes touring-bike has the 110 images of Office-Caltech-10."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As in FedBN's archive: 30, 40, 20 and 30 images."""
    office_caltech10.make(tmp_path / "office")
    return tmp_path / "office"


def sizes(module: OfficeCaltech10DataModule) -> list[int]:
    return [row["train"] + row["val"] + row["test"] for row in module.describe()]  # type: ignore[operator]


def test_one_client_a_domain_of_equal_sizes(folder: Path) -> None:
    module = OfficeCaltech10DataModule(folder, image_size=8)
    module.prepare_data()
    module.setup()
    assert [client.name for client in module.clients] == [
        "seen-amazon-00",
        "seen-caltech-00",
        "seen-dslr-00",
        "seen-webcam-00",
    ]
    assert sizes(module) == [20] * 4 and module.num_classes == 10 and module.input_shape == (3, 8, 8)
    assert {(row["train"], row["val"], row["test"]) for row in module.describe()} == {(13, 3, 4)}


def test_the_seed_chooses_which_images_are_kept(folder: Path) -> None:
    kept = []
    for seed in (0, 0, 1):
        client = OfficeCaltech10DataModule(folder, image_size=8, seed=seed).clients[1]
        kept.append(np.sort(np.concatenate([labels_of(getattr(client, role)) for role in ("train", "val", "test")])))
    assert np.array_equal(kept[0], kept[1]) and not np.array_equal(kept[0], kept[2])


def test_uncut_domains_and_several_clients_in_both_pools(folder: Path) -> None:
    module = OfficeCaltech10DataModule(
        folder, image_size=8, equal_domains=False, clients_per_domain=2, unseen_clients_per_domain=1, alpha=1.0
    )
    assert [len(module.pool(pool)) for pool in ("seen", "unseen")] == [8, 4]
    assert sizes(module) == [10, 10, 13, 13, 6, 6, 10, 10, 10, 13, 7, 10]


def test_office31_with_caltech256_is_read_as_well(tmp_path: Path) -> None:
    for domain in ("amazon", "dslr", "webcam"):
        for label in (*CLASSES, "bookcase"):
            for number in (1, 2):
                place = tmp_path / domain / "images" / OFFICE31.get(label, label)
                write_image(place / f"frame_{number:04d}.jpg", seed=number)
    for folder in (*CALTECH256, "001.ak47", "146.mountain-bike", "257.clutter"):
        for number in (1, 2):
            write_image(tmp_path / "256_ObjectCategories" / folder / f"{folder[:3]}_{number:04d}.jpg", seed=number)
    module = OfficeCaltech10DataModule(tmp_path, image_size=8)
    module.prepare_data()
    assert sizes(module) == [20] * 4
    for client in module.clients:
        together = np.concatenate([labels_of(getattr(client, role)) for role in ("train", "val", "test")])
        assert np.bincount(together).tolist() == [2] * 10


def remove(what: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        shutil.rmtree(folder / what)

    return act


@pytest.mark.parametrize(
    ("break_it", "missing"),
    [(remove("."), "amazon"), (remove("dslr"), "dslr"), (remove("webcam/mug"), "webcam/mug")],
)
def test_what_is_missing_is_named_with_where_to_get_it(
    folder: Path, break_it: Callable[[Path], None], missing: str
) -> None:
    break_it(folder)
    with pytest.raises(DataError, match=rf"Office-Caltech-10 is not there: .*{missing} is missing\. Download .*FedBN"):
        OfficeCaltech10DataModule(folder).prepare_data()
    with pytest.raises(DataError, match="FEDL2P_DATA"):
        OfficeCaltech10DataModule(folder).setup()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"domains": ["caltech10"]}, "amazon, caltech, dslr, webcam"), ({"domains": []}, "at least one")],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        OfficeCaltech10DataModule(**wrong)


def test_a_round_of_training(folder: Path, tmp_path: Path) -> None:
    arguments = {"root": str(folder), "image_size": 8}
    methods = run_one_round("fedl2p.datamodules.OfficeCaltech10DataModule", arguments, tmp_path / "run", in_channels=3)
    assert len(methods["fedl2p"]["seen"]["clients"]) == 4 and "unseen" not in methods["fedl2p"]


def test_the_real_images(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    root = shared_data("office_caltech10")
    module = OfficeCaltech10DataModule(root, image_size=32)
    module.prepare_data()
    assert sizes(module) == [157] * 4
    assert {(row["train"], row["val"], row["test"]) for row in module.describe()} == {(101, 25, 31)}
    assert sizes(OfficeCaltech10DataModule(root, image_size=8, equal_domains=False)) == [958, 1123, 157, 295]
    arguments = {"root": str(root), "image_size": 32, "client_size": 40}
    assert run_one_round("fedl2p.datamodules.OfficeCaltech10DataModule", arguments, tmp_path / "run", in_channels=3)[
        "fedl2p"
    ]
