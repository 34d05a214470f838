"""MNIST and USPS from an `.npz` or from torchvision's files: two domains of the same ten digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_round import run_one_round
from tiny_data import digits_two_domains

from fedl2p.datamodules import DigitsTwoDomainsDataModule
from fedl2p.datamodules.base.arrays import ArrayDataset, labels_of
from fedl2p.errors import DataError

SMALL: dict[str, Any] = {
    "clients_per_domain": 2,
    "unseen_clients_per_domain": 1,
    "pretrain_clients_per_domain": 1,
    "client_size": 20,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """torchvision's files: 150 of MNIST and 120 of USPS."""
    digits_two_domains.make(tmp_path / "digits")
    return tmp_path / "digits"


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """The same images as bytes, as far as the text of USPS has them exactly."""
    columns = {}
    for name, (count, side, seed) in {"mnist": (150, 28, 0), "usps": (120, 16, 1)}.items():
        columns[f"{name}_images"], columns[f"{name}_labels"] = digits_two_domains.digits(count, side, seed)
    np.savez(tmp_path / "digits_mnist_usps.npz", **columns)
    return tmp_path / "digits_mnist_usps.npz"


def inputs(module: DigitsTwoDomainsDataModule, client: int) -> torch.Tensor:
    dataset = module.clients[client].train
    assert isinstance(dataset, ArrayDataset)
    return dataset[list(range(len(dataset)))][0]


def test_pools_and_sizes(npz: Path) -> None:
    module = DigitsTwoDomainsDataModule(npz, **SMALL)
    module.prepare_data()
    assert [client.name for client in module.clients] == [
        "pretrain-mnist-00",
        "seen-mnist-00",
        "seen-mnist-01",
        "seen-usps-00",
        "seen-usps-01",
        "unseen-mnist-00",
        "unseen-usps-00",
    ]
    assert {(row["train"], row["val"], row["test"]) for row in module.describe()} == {(9, 3, 8)}
    assert module.input_shape == (1, 28, 28) and module.num_classes == 10
    for client in range(len(module.clients)):
        own = inputs(module, client)
        assert own.dtype == torch.float32 and own.min() >= 0 and 0.9 < own.max() <= 1


def test_torchvisions_files_give_the_same_clients_as_the_arrays(folder: Path, npz: Path) -> None:
    module, other = (DigitsTwoDomainsDataModule(root, **SMALL) for root in (folder, npz))
    module.prepare_data()
    for number in range(7):
        assert np.array_equal(labels_of(module.clients[number].train), labels_of(other.clients[number].train))
        # The text of USPS has four digits, and torchvision rounds down.
        torch.testing.assert_close(inputs(module, number), inputs(other, number), atol=2.1 / 255, rtol=0)


@pytest.mark.parametrize("size", [16, 28, 8])
def test_images_are_resampled_to_one_size(npz: Path, size: int) -> None:
    module = DigitsTwoDomainsDataModule(npz, image_size=size, pretrain_domains=None, **SMALL)
    for number, client in enumerate(module.clients):
        own, labels = inputs(module, number), labels_of(client.train)
        assert own.shape[1:] == (1, size, size)
        native = 28 if client.domain == "mnist" else 16
        brightest = own.mean(dim=3)[:, 0].argmax(dim=1).numpy()
        # The maker draws a row for each digit.
        assert np.abs((brightest + 0.5) / size - (labels + 3 + 0.5) / native).max() < 1.01 / min(size, native)


def test_a_folder_is_looked_for_beside_the_file(folder: Path, npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDL2P_DATA", str(npz.parent))
    assert DigitsTwoDomainsDataModule().root == npz
    assert len(DigitsTwoDomainsDataModule(npz.parent, **SMALL).clients) == 7
    npz.unlink()
    folder.rename(folder.parent / "digits_mnist_usps")
    module = DigitsTwoDomainsDataModule(**SMALL)
    module.prepare_data()
    assert len(module.clients) == 7


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDL2P_DATA", str(tmp_path))
    with pytest.raises(
        DataError, match=r"MNIST with USPS is not there: .*digits_mnist_usps is missing\. Set .*download"
    ):
        DigitsTwoDomainsDataModule().prepare_data()
    digits_two_domains.write_mnist(tmp_path / "mine", 20)
    with pytest.raises(DataError, match="MNIST with USPS is not there"):
        DigitsTwoDomainsDataModule(tmp_path / "mine").setup()


def test_missing_parts_are_downloaded_when_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets.usps

    asked: list[str] = []

    def fail(url: str, *_: Any, **__: Any) -> None:
        asked.append(url)
        raise OSError("no network here")

    monkeypatch.setattr(torchvision.datasets.usps, "download_url", fail)
    (folder / "usps.t.bz2").unlink()
    with pytest.raises(DataError, match=r"MNIST and USPS cannot be downloaded to .*: no network here"):
        DigitsTwoDomainsDataModule(folder, download=True).prepare_data()
    assert len(asked) == 1 and asked[0].endswith("usps.t.bz2")


def test_broken_files_are_named(folder: Path, npz: Path) -> None:
    npz.write_bytes(npz.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"digits_mnist_usps\.npz cannot be read"):
        DigitsTwoDomainsDataModule(npz).setup()
    (folder / "usps.bz2").write_bytes((folder / "usps.bz2").read_bytes()[:200])
    with pytest.raises(DataError, match=r"The files of MNIST and USPS in .* are broken"):
        DigitsTwoDomainsDataModule(folder).setup()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"usps_labels": None}, "has no array .*usps_labels"),
        ({"usps_labels": np.zeros(3)}, r"usps_labels of shape \(3,\)"),
        ({"mnist_images": np.zeros((150, 784), np.uint8)}, r"mnist_images of type uint8 and shape \(150, 784\)"),
        ({"mnist_images": np.zeros((150, 28, 28))}, "mnist_images of type float64"),
        ({"mnist_images": np.array([None] * 150)}, "cannot be read: Object arrays"),
    ],
)
def test_arrays_of_a_wrong_kind_are_named(npz: Path, change: dict[str, Any], message: str) -> None:
    columns = {name: array for name, array in (dict(np.load(npz)) | change).items() if array is not None}
    np.savez(npz, **columns)
    with pytest.raises(DataError, match=message):
        DigitsTwoDomainsDataModule(npz).setup()


def test_wrong_arguments_are_named(npz: Path) -> None:
    with pytest.raises(DataError, match="image_size is 0"):
        DigitsTwoDomainsDataModule(npz, image_size=0)
    with pytest.raises(DataError, match="There is no domain 'svhn'; the domains are mnist, usps"):
        DigitsTwoDomainsDataModule(npz, domains=["svhn"]).setup()


def test_a_round_of_training(folder: Path, tmp_path: Path) -> None:
    arguments = {"root": str(folder), "image_size": 16, **SMALL}
    methods = run_one_round("fedl2p.datamodules.DigitsTwoDomainsDataModule", arguments, tmp_path / "run")
    assert len(methods["fedl2p"]["seen"]["clients"]) == 4 and len(methods["fedl2p"]["unseen"]["clients"]) == 2


def test_the_real_digits(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    root = shared_data("digits_mnist_usps.npz")
    whole = DigitsTwoDomainsDataModule(root, client_size=None, pretrain_clients_per_domain=0)
    assert sum(row["train"] + row["val"] + row["test"] for row in whole.describe()) > 19_200  # type: ignore[misc]
    assert len(DigitsTwoDomainsDataModule(root).clients) == 110
    arguments = {"root": str(root), "image_size": 16, **SMALL}
    assert run_one_round("fedl2p.datamodules.DigitsTwoDomainsDataModule", arguments, tmp_path / "run")["fedl2p"]
