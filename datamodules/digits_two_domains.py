"""Handwritten digits from two sources: MNIST's test set, and all of USPS.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition" (1998): 10,000 images of
28x28. Hull, "A database for handwritten text recognition research" (1994): 9,298 images of 16x16, from envelopes.
"""

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedl2p.datamodules.base.domains import Domain, DomainsDataModule, Samples
from fedl2p.datamodules.base.partition import IntArray
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.io.files import data_folder, missing_data
from fedl2p.errors import DataError

DOMAINS = ("mnist", "usps")
_NAME = "digits_mnist_usps"
_GET = (
    "Set data.init_args.download to true, which lets torchvision fetch MNIST (12 MB) and USPS (8 MB) into that folder; "
    f"or put there {_NAME}.npz with mnist_images, mnist_labels, usps_images and usps_labels."
)


class DigitsTwoDomainsDataModule(DomainsDataModule):
    """Inputs of shape (1, image_size, image_size) in [0, 1], 10 classes, 2 domains that are no corruptions.

    Images of another size are resampled, bilinear and smoothed where they shrink. By default the pretrain clients have
    MNIST alone, so that USPS is new to the global model.

    Args:
        root: The `.npz` file, or a folder with it or with torchvision's MNIST and USPS; None looks for
            ``digits_mnist_usps.npz``, then for a folder ``digits_mnist_usps``, among the data sets.
        download: Fetch what is missing by torchvision.
        image_size: Side of the images in pixels, at least 1.
        **options: `batch_size`, and the words of `Split` in `split_keys`; `domains` are mnist and usps.

    Raises:
        DataError: If an argument is not as above. `prepare_data` and `setup` raise it when the files are missing or
            broken.
    """

    num_classes = 10
    domain_names = DOMAINS
    split = Split(
        alpha=1.0,
        clients_per_domain=30,
        unseen_clients_per_domain=15,
        pretrain_clients_per_domain=20,
        pretrain_domains=("mnist",),
        client_size=100,
        val_fraction=0.25,
        test_fraction=0.4,
    )

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        download: bool = False,
        image_size: int = 28,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if image_size < 1:
            raise DataError(f"image_size is {image_size}; it must be at least 1.")
        self.image_size = image_size
        self.download = download
        self.root = data_folder(root, f"{_NAME}.npz")
        if root is None and not self.root.exists():
            self.root = data_folder(None, _NAME)

    def prepare_data(self) -> None:
        """Looks for the files, and fetches them where that was asked for.

        Raises:
            DataError: If they are not there.
        """
        if self._npz() is None:
            self._from_torchvision(download=self.download)

    def find(self) -> Iterable[Domain]:
        """Both domains; a sample's key is its image."""
        place = self._npz()
        found = self._from_torchvision() if place is None else _from_npz(place)
        for name, (images, labels) in found.items():
            yield Domain(name, Samples(list(_resized(images, self.image_size)), labels))

    def read(self, keys: Sequence[Tensor]) -> Tensor:
        """Shape (n, 1, image_size, image_size), uint8."""
        return torch.stack(list(keys))

    def _npz(self) -> Path | None:
        """The `.npz` file, if there is one."""
        inside = self.root / f"{_NAME}.npz"
        if inside.is_file():
            return inside
        return self.root if self.root.is_file() else None

    def _from_torchvision(self, *, download: bool = False) -> dict[str, tuple[Tensor, IntArray]]:
        from torchvision.datasets import MNIST, USPS

        try:
            mnist = MNIST(self.root, train=False, download=download)
            usps = [USPS(self.root, train=train, download=download) for train in (True, False)]
        except (OSError, RuntimeError) as error:  # no files; no network; a download with a wrong checksum
            if download:
                raise DataError(f"MNIST and USPS cannot be downloaded to {self.root}: {error}") from error
            raise missing_data("MNIST with USPS", looked_for=self.root, get=_GET) from error
        except (ValueError, EOFError, IndexError) as error:
            raise DataError(f"The files of MNIST and USPS in {self.root} are broken: {error}") from error
        return {
            "mnist": (mnist.data, mnist.targets.numpy().astype(np.int64)),
            "usps": (
                torch.from_numpy(np.concatenate([part.data for part in usps])),
                np.concatenate([part.targets for part in usps]).astype(np.int64),
            ),
        }


def _from_npz(place: Path) -> dict[str, tuple[Tensor, IntArray]]:
    try:
        # numpy leaves a file open that it opened itself and cannot read.
        with place.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {name: (file[f"{name}_images"], file[f"{name}_labels"]) for name in DOMAINS}
    except KeyError as error:
        raise DataError(f"{place} has no array {error}; it must hold images and labels of mnist and usps.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{place} cannot be read: {error}") from error
    for name, (images, labels) in found.items():
        if (
            images.dtype != np.uint8
            or images.ndim != 3
            or labels.shape != images.shape[:1]
            or labels.dtype.kind not in "iu"
        ):
            raise DataError(
                f"{place} has {name}_images of type {images.dtype} and shape {images.shape}, and {name}_labels of "
                f"type {labels.dtype} and shape {labels.shape}; they must be bytes of shape (n, height, width), and "
                "whole numbers of shape (n,)."
            )
    return {name: (torch.from_numpy(images), labels.astype(np.int64)) for name, (images, labels) in found.items()}


def _resized(images: Tensor, size: int) -> Tensor:
    """Bytes of shape (n, height, width) as bytes of shape (n, 1, size, size)."""
    planes = images.unsqueeze(1)
    if planes.shape[2:] == (size, size):
        return planes
    options = {"mode": "bilinear", "antialias": True, "align_corners": False}
    resized = torch.nn.functional.interpolate(planes.float(), (size, size), **options)  # type: ignore[arg-type]  # options of mixed types
    return resized.round_().clamp_(0, 255).to(torch.uint8)
