"""A user's own image files, by domain and class; and what all data sets of image files share."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedl2p.datamodules.base.domains import Domain, DomainsDataModule, Samples
from fedl2p.datamodules.io.files import data_folder, missing_data
from fedl2p.datamodules.io.images import IMAGENET_MEAN, IMAGENET_STD, Fit, flip_and_rotate, image_files, read_images
from fedl2p.errors import DataError


class ImageDomainsDataModule(DomainsDataModule):
    """Domains whose samples are image files: inputs of shape (3, image_size, image_size), or (1, ...) in grey.

    Args:
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

    def __init__(
        self,
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


class ImageFolderDataModule(ImageDomainsDataModule):
    """A user's own images: ``root/<domain>/<class>/<file>``, or ``root/<class>/<file>`` for a single domain.

    The classes are the names of the class folders of all domains, in alphabetical order; a domain may lack some.
    Files are images by their suffix, in any case: bmp, gif, jpeg, jpg, pgm, png, ppm, tif, tiff, webp.

    Attributes:
        classes: Names of the classes, by number; set by `setup`.
        num_classes: How many there are; set by `setup`.

    Args:
        root: The folder; None looks for ``image_folder`` among the data sets.
        fit: See `ImageDomainsDataModule`.
        augment: Mirror and turn training images; for classes that stay what they are.
        **options: `batch_size`, other arguments of `ImageDomainsDataModule`, and the words of `Split` in `split_keys`;
            `domains` are folders.

    Raises:
        DataError: If an argument is not as above. `prepare_data` and `setup` raise it when there are no images, or an
            image cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        fit: Fit = "crop",
        augment: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(fit=fit, augment=augment, **options)
        self.root = data_folder(root, "image_folder")

    def prepare_data(self) -> None:
        """Looks for the folder.

        Raises:
            DataError: If it is not there, or holds no images in folders.
        """
        if not self.root.is_dir():
            raise missing_data(
                "The folder of images",
                looked_for=self.root,
                get="Put your images into <domain>/<class>/ or <class>/ in it.",
            )
        self._class_folders()

    def setup(self, stage: str | None = None) -> None:
        """Finds the classes, and builds the clients at the first call.

        Args:
            stage: Ignored.

        Raises:
            DataError: See `FederatedDataModule.setup`.
        """
        if self._clients is None:
            self.prepare_data()
            names = {folder.name for folders in self._class_folders().values() for folder in folders}
            self.classes = tuple(sorted(names))
            self.num_classes = len(names)
        super().setup(stage)

    def find(self) -> Iterable[Domain]:
        """The domains by folder, or one called ``all``."""
        for name, folders in self._class_folders().items():
            by_class = {folder.name: folder for folder in folders}
            yield Domain(name, class_samples([by_class.get(label) for label in self.classes]))

    def _class_folders(self) -> dict[str, list[Path]]:
        """The class folders of each domain."""
        folders = subfolders(self.root)
        with_images = [folder for folder in folders if image_files(folder)]
        if with_images and len(with_images) < len(folders):
            other = next(folder for folder in folders if folder not in with_images)
            raise DataError(
                f"In {self.root}, {with_images[0].name} has images and {other.name} has none; it must hold either "
                "<domain>/<class>/<file> or <class>/<file>."
            )
        if with_images:
            return {"all": folders}
        found = {folder.name: subfolders(folder) for folder in folders}
        if not any(found.values()):
            raise DataError(f"{self.root} holds no images in <domain>/<class>/ or <class>/ folders.")
        return found
