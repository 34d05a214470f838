"""Domains whose samples are image files: what all such data sets share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedl2p.datamodules.base.domains import DomainsDataModule, Samples
from fedl2p.datamodules.io.files import data_folder
from fedl2p.datamodules.io.images import IMAGENET_MEAN, IMAGENET_STD, Fit, flip_and_rotate, image_files, read_images
from fedl2p.errors import DataError


class ImageDomainsDataModule(DomainsDataModule):
    """Domains whose samples are image files: inputs of shape (3, image_size, image_size), or (1, ...) in grey.

    A subclass says in `folder` where its files are.

    Args:
        root: The folder with the files; None looks for `folder` among the data sets.
        image_size: Side of the images in pixels, at least 1.
        fit: ``crop`` scales the short side and cuts out the middle; ``stretch`` scales both sides and loses nothing.
        grayscale: One channel instead of three.
        mean: Taken off each channel, in units of [0, 1]; None is ImageNet's (in grey: its average).
        std: Divided by, likewise.
        augment: Mirror and turn training images by up to 30 degrees, see `flip_and_rotate`.
        **options: The arguments of `DomainsDataModule`.

    Raises:
        DataError: If an argument is not as above.
    """

    folder: str
    """The data set's folder among all data sets."""

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        image_size: int = 224,
        fit: Fit = "stretch",
        grayscale: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = data_folder(root, self.folder)
        if image_size < 1:
            raise DataError(f"image_size is {image_size}; it must be at least 1.")
        self.image_size = image_size
        self.fit: Fit = fit
        self.grayscale = grayscale
        self.mean = _channels(IMAGENET_MEAN, grayscale) if mean is None else tuple(mean)
        self.std = _channels(IMAGENET_STD, grayscale) if std is None else tuple(std)
        self.augmentation = flip_and_rotate if augment else None

    def read(self, keys: Sequence[Path]) -> Tensor:
        """The images of some files, shape (n, channels, image_size, image_size), uint8."""
        return read_images(keys, self.image_size, fit=self.fit, grayscale=self.grayscale)


def _channels(values: Sequence[float], grayscale: bool) -> tuple[float, ...]:
    return (sum(values) / len(values),) if grayscale else tuple(values)


def class_samples(folders: Sequence[Path | None]) -> Samples:
    """The image files in a folder for each class, None for a class that is not there."""
    files = [[] if folder is None else image_files(folder) for folder in folders]
    labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(own) for own in files])
    return Samples([path for own in files for path in own], labels)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name, without hidden ones."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [folder / name for name in names]
