"""The files of CIFAR-10: as published, or as JPEG bytes."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedl2p.datamodules.base.partition import IntArray
from fedl2p.datamodules.io.files import missing_data, read_npz
from fedl2p.datamodules.io.images import image_errors
from fedl2p.errors import DataError

JPEG_FILE = "cifar10_jpeg.npz"

_GET = (
    "Set data.init_args.download to true, which lets torchvision fetch it (170 MB), or unpack "
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there; or put there "
    f"{JPEG_FILE}, with the images as JPEG bytes (jpeg, offsets, labels, split)."
)

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
    content, offsets, labels, split = read_npz(place, ("jpeg", "offsets", "labels", "split"))
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
