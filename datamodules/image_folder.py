"""A user's own image files, by domain and class."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedl2p.datamodules.base.domains import Domain
from fedl2p.datamodules.base.image_domains import ImageDomainsDataModule, class_samples, subfolders
from fedl2p.datamodules.io.files import missing_data
from fedl2p.datamodules.io.images import Fit, image_files
from fedl2p.errors import DataError


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

    folder = "image_folder"

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        fit: Fit = "crop",
        augment: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(root, fit=fit, augment=augment, **options)

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
