"""CIFAR-10 with label skew between clients.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009): 60,000 photographs of 32x32 in ten classes.
"""

import io
import logging
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedl2p.datamodules.base.arrays import crop_and_flip
from fedl2p.datamodules.base.domains import Domain, DomainsDataModule, Samples
from fedl2p.datamodules.base.partition import IntArray
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.io.files import data_folder, missing_data
from fedl2p.datamodules.io.images import image_errors
from fedl2p.errors import DataError

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
JPEG_FILE = "cifar10_jpeg.npz"

_GET = (
    "Set data.init_args.download to true, which lets torchvision fetch it (170 MB), or unpack "
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there; or put there "
    f"{JPEG_FILE}, with the images as JPEG bytes (jpeg, offsets, labels, split)."
)

_LOGGER = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]
Labelled = tuple[Bytes, IntArray]
"""Images, shape (n, 32, 32, 3), and labels, shape (n,)."""


def read_cifar10(root: Path, *, download: bool = False, only_test: bool = False) -> dict[str, Labelled]:
    """Reads CIFAR-10 from a folder with the published batches, or with JPEG bytes in an `.npz` file.

    Args:
        root: The folder, or the `.npz` file.
        download: Fetch the published batches where nothing is there.
        only_test: Leave the training images out.

    Returns:
        The splits `train` and `test`.

    Raises:
        DataError: If nothing is there, or it is broken.
    """
    place = root / JPEG_FILE if root.is_dir() else root
    if place.is_file():
        return _from_jpeg(place, ("test",) if only_test else ("train", "test"))
    from torchvision.datasets import CIFAR10

    try:
        # torchvision compares checksums before it unpickles.
        sets = {name: CIFAR10(root, train=name == "train", download=download) for name in ("train", "test")}
    except (OSError, RuntimeError) as error:  # no files; no network; wrong checksums
        if download:
            raise DataError(f"CIFAR-10 cannot be downloaded to {root}: {error}") from error
        raise missing_data("CIFAR-10", looked_for=root / "cifar-10-batches-py", get=_GET) from error
    return {
        name: (found.data, np.asarray(found.targets, dtype=np.int64))
        for name, found in sets.items()
        if name == "test" or not only_test
    }


def _from_jpeg(place: Path, names: Sequence[str]) -> dict[str, Labelled]:
    try:
        with place.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            content, offsets, labels, split = (file[name] for name in ("jpeg", "offsets", "labels", "split"))
    except KeyError as error:
        raise DataError(f"{place} has no array {error}; it must hold jpeg, offsets, labels and split.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{place} cannot be read: {error}") from error
    if not (len(offsets) - 1 == len(labels) == len(split) and {offsets.dtype.kind, labels.dtype.kind} <= {*"iu"}):
        raise DataError(
            f"{place} has {len(offsets)} offsets, {len(labels)} labels and {len(split)} splits; they must be whole "
            "numbers, one offset more than there are labels, and as many names of splits."
        )
    result: dict[str, Labelled] = {}
    for name in names:
        rows = np.flatnonzero(split == name)
        images = np.empty((len(rows), 32, 32, 3), dtype=np.uint8)
        for position, row in enumerate(rows):
            images[position] = _decoded(content[offsets[row] : offsets[row + 1]].tobytes(), place, int(row))
        result[name] = images, labels[rows].astype(np.int64)
    return result


def _decoded(content: bytes, place: Path, row: int) -> Bytes:
    from PIL import Image

    with image_errors(f"Image {row} of {place}"), Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        if image.size != (32, 32):
            raise ValueError(f"it has {image.width} x {image.height} pixels, not 32 x 32")
        return np.asarray(image.convert("RGB"))


def as_inputs(images: Bytes) -> Tensor:
    """Images (n, 32, 32, 3) as inputs (n, 3, 32, 32), uint8."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


class CIFAR10DataModule(DomainsDataModule):
    """CIFAR-10: inputs of shape (3, 32, 32), normalized by channel, 10 classes.

    The training images are dealt to all clients, of whatever pool, by a Dirichlet distribution, and a client's
    validation set is a part of its own; the published test images are dealt so that each client has its own labels
    again. The paper has 1,000 seen clients of 40 + 10 + 10 images, at alpha 1000, 1.0, 0.5 and 0.1 (section 4.1), and
    trains the global model on the same ones (`pretraining.pool: seen`).

    Args:
        root: The folder with CIFAR-10; None is ``cifar10`` among the data sets.
        download: Fetch what is missing by torchvision.
        augment: Shift and mirror the images of training batches.
        samples_per_client: The old name of `client_size`.
        **options: `batch_size`, and the words of `Split` in `split_keys`.

    Raises:
        DataError: If an argument is not as above. `prepare_data` and `setup` raise it when the files are missing or
            broken.
    """

    num_classes = len(CLASSES)
    classes = CLASSES
    mean = MEAN
    std = STD
    split = Split(alpha=0.5, seen_clients=1000)
    domain_names = ("cifar10",)
    split_keys = (
        "seed",
        "domains",
        "alpha",
        "seen_clients",
        "unseen_clients",
        "pretrain_clients",
        "client_size",
        "val_fraction",
    )

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        download: bool = False,
        augment: bool = False,
        samples_per_client: int | None = None,
        **options: Any,
    ) -> None:
        if samples_per_client is not None:
            _LOGGER.warning("samples_per_client is now called client_size; the old name goes with the next release.")
            options.setdefault("client_size", samples_per_client)
        super().__init__(**options)
        self.augmentation = crop_and_flip if augment else None
        self.download = download
        self.root = data_folder(root, "cifar10")

    def client_counts(self, domain: str) -> tuple[int, int, int]:
        """Of the federation, since all is one domain."""
        return self.split.pretrain_clients, self.split.seen_clients, self.split.unseen_clients

    def prepare_data(self) -> None:
        """Looks for the files, and fetches them where that was asked for.

        Raises:
            DataError: If they are not there.
        """
        if self.download:
            read_cifar10(self.root, download=True, only_test=True)
        elif not (self.root.is_file() or (self.root / JPEG_FILE).is_file()):
            read_cifar10(self.root, only_test=True)

    def find(self) -> Iterable[Domain]:
        """One domain; a sample's key is its image."""
        splits = read_cifar10(self.root)
        train, test = (Samples(list(images), labels) for images, labels in (splits["train"], splits["test"]))
        yield Domain("cifar10", train, test)

    def read(self, keys: Sequence[Bytes]) -> Tensor:
        """Shape (n, 3, 32, 32), uint8."""
        return as_inputs(np.stack(keys))
