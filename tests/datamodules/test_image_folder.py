"""A user's own images, by domain and class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_round import run_one_round
from tiny_data import image_folder
from tiny_data.images import write_image

from fedl2p.datamodules import ImageFolderDataModule
from fedl2p.datamodules.base.arrays import labels_of
from fedl2p.datamodules.io.images import read_images
from fedl2p.errors import DataError

IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two domains, three classes, 12 images a class."""
    image_folder.make(tmp_path / "mine")
    return tmp_path / "mine"


def test_domains_and_classes_are_folders(folder: Path) -> None:
    module = ImageFolderDataModule(folder, image_size=8, clients_per_domain=2, unseen_clients_per_domain=1)
    module.prepare_data()
    module.setup()
    assert module.classes == ("cat", "dog", "owl") and module.num_classes == 3 and module.input_shape == (3, 8, 8)
    assert [client.name for client in module.clients] == [
        "seen-hospital_a-00",
        "seen-hospital_a-01",
        "seen-hospital_b-00",
        "seen-hospital_b-01",
        "unseen-hospital_a-00",
        "unseen-hospital_b-00",
    ]
    for client in module.clients:
        counts = np.bincount(labels_of(client.train), minlength=3)
        assert len(client.train) == 8 and counts.min() >= 2  # type: ignore[arg-type]


def test_without_domains_there_is_one(folder: Path) -> None:
    module = ImageFolderDataModule(folder / "hospital_a", image_size=8)
    assert [client.name for client in module.clients] == ["seen-all-00"]
    assert module.num_classes == 3


def test_inputs_are_the_images_normalized_as_imagenet(folder: Path) -> None:
    module = ImageFolderDataModule(folder, image_size=8)
    paths = sorted(folder.rglob("hospital_a/*/*.png"))
    expected = read_images(paths, 8).float() / 255
    expected = (expected - IMAGENET[0][:, None, None]) / IMAGENET[1][:, None, None]
    client = module.clients[0]
    got = torch.cat(
        [getattr(client, role)[list(range(len(getattr(client, role))))][0] for role in ("train", "val", "test")]
    )
    order, wanted = (torch.argsort(images.flatten(1).sum(1)) for images in (got, expected))
    torch.testing.assert_close(got[order], expected[wanted])


def test_grey_and_own_normalization(folder: Path) -> None:
    module = ImageFolderDataModule(folder, image_size=8, grayscale=True, mean=[0.5], std=[0.25])
    assert module.input_shape == (1, 8, 8)
    grey = ImageFolderDataModule(folder, image_size=8, grayscale=True)
    assert grey.mean == pytest.approx((0.449,)) and grey.std == pytest.approx((0.226,))
    with pytest.raises(DataError, match="mean has 1 numbers; the inputs have 3 channels"):
        ImageFolderDataModule(folder, image_size=8, mean=[0.5], std=[0.25]).setup()


def test_a_domain_may_lack_classes_and_chosen_domains_keep_the_numbers_of_all(folder: Path) -> None:
    for number in range(6):
        write_image(folder / "hospital_c" / "bat" / f"{number}.jpg", seed=number)
    module = ImageFolderDataModule(folder, image_size=8, domains=["hospital_c", "hospital_a"])
    assert module.clients[0].domain == "hospital_c" and set(labels_of(module.clients[0].train)) == {0}
    assert module.num_classes == 4 and set(labels_of(module.clients[1].train)) == {1, 2, 3}


def test_augmentation_is_for_training_alone(folder: Path) -> None:
    plain, augmented = (
        ImageFolderDataModule(folder, image_size=8, augment=augment).client(0) for augment in (False, True)
    )
    for loader, same in (("train_dataloader", False), ("statistics_dataloader", True), ("val_dataloader", True)):
        (one, other) = (next(iter(getattr(module, loader)()))[0] for module in (plain, augmented))
        assert torch.equal(one, other) == same


def test_a_truncated_image_is_named_at_setup(folder: Path) -> None:
    broken = folder / "hospital_b" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    module = ImageFolderDataModule(folder, image_size=8)
    module.prepare_data()
    with pytest.raises(DataError, match=r"hospital_b/dog/3\.png cannot be read"):
        module.setup()


def mixed(folder: Path) -> None:
    write_image(folder / "cat" / "1.jpg")
    write_image(folder / "hospital" / "dog" / "1.jpg")


def empty_class_folders(folder: Path) -> None:
    (folder / "hospital" / "cat").mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: None,
            r"The folder of images is not there: .* Put your images into <domain>/<class>/.*FEDL2P_DATA",
        ),
        (lambda folder: folder.mkdir(), "holds no images in <domain>/<class>/ or <class>/ folders"),
        (mixed, "cat has images and hospital has none"),
        (empty_class_folders, "The domain 'hospital' has no samples"),
        (lambda folder: [write_image(folder / "a" / f"{i}.png") for i in range(2)], "A client has 2 samples"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "mine")
    with pytest.raises(DataError, match=message):
        ImageFolderDataModule(tmp_path / "mine").setup()


def test_the_folder_of_all_data_sets_is_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDL2P_DATA", str(folder.parent))
    folder.rename(folder.parent / "image_folder")
    assert len(ImageFolderDataModule(image_size=8).clients) == 2


@pytest.mark.parametrize(("wrong", "message"), [({"image_size": 0}, "image_size is 0"), ({"domains": ["x"]}, "'x'")])
def test_wrong_arguments_are_named(folder: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageFolderDataModule(folder, **wrong).setup()


def test_a_round_of_training(folder: Path, tmp_path: Path) -> None:
    arguments = {"root": str(folder), "image_size": 8, "clients_per_domain": 2, "unseen_clients_per_domain": 1}
    arguments |= {"augment": True, "alpha": 1.0}
    methods = run_one_round(
        "fedl2p.datamodules.ImageFolderDataModule", arguments, tmp_path / "run", in_channels=3, num_classes=3
    )
    assert len(methods["fedl2p"]["seen"]["clients"]) == 4 and len(methods["fedl2p"]["unseen"]["clients"]) == 2
