"""Office-Caltech-10: ten kinds of office objects as four sources show them.

Gong, Shi, Sha and Grauman, "Geodesic Flow Kernel for Unsupervised Domain Adaptation" (CVPR 2012): the classes that
Office-31 (Saenko et al. 2010) and Caltech-256 (Griffin et al. 2007) have in common. 2,533 images.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedl2p.datamodules.base.domains import Domain
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.image_folder import ImageDomainsDataModule, class_samples, subfolders
from fedl2p.datamodules.io.files import data_folder, missing_data

DOMAINS = ("amazon", "caltech", "dslr", "webcam")
CLASSES = (
    "backpack",
    "bike",
    "calculator",
    "headphones",
    "keyboard",
    "laptop",
    "monitor",
    "mouse",
    "mug",
    "projector",
)
# The same domains and classes in the archives of Gong et al., of Office-31 and of Caltech-256.
_DOMAIN_FOLDERS: Mapping[str, tuple[str, ...]] = {"caltech": ("caltech", "caltech10", "256_ObjectCategories")}
_CLASS_FOLDERS: Mapping[str, tuple[str, ...]] = {
    "backpack": ("back_pack", "003.backpack"),
    "bike": ("224.touring-bike",),
    "calculator": ("027.calculator",),
    "headphones": ("101.head-phones",),
    "keyboard": ("045.computer-keyboard",),
    "laptop": ("laptop_computer", "127.laptop-101"),
    "monitor": ("046.computer-monitor",),
    "mouse": ("047.computer-mouse",),
    "mug": ("041.coffee-mug",),
    "projector": ("238.video-projector",),
}
_GET = (
    "Download office_caltech_10_dataset.zip of FedBN (the link is in the README of github.com/med-air/FedBN), or "
    "Office-31 (faculty.cc.gatech.edu/~judy/domainadapt) for amazon, dslr and webcam and Caltech-256 "
    "(data.caltech.edu/records/nyy15-4j048) for caltech, and unpack it so that amazon, caltech, dslr and webcam lie "
    "there, each with a folder for each class."
)


class OfficeCaltech10DataModule(ImageDomainsDataModule):
    """Inputs of shape (3, image_size, image_size), 10 classes, 4 domains; FedL2P's paper has one client for each.

    Every domain is cut to the smallest, dslr with 157 images. The paper does not say how images are made square: its
    authors' code stretches them to 256 pixels, and turns and mirrors those for training.

    The folder holds ``<domain>/<class>/`` or, as in Office-31's archive, ``<domain>/images/<class>/``; caltech may also
    be called caltech10 or 256_ObjectCategories, and classes as in Office-31 (back_pack) or Caltech-256 (003.backpack).
    Other folders are not looked at.

    Args:
        root: The folder; None looks for ``office_caltech10`` among the data sets.
        **options: `batch_size`, arguments of `ImageDomainsDataModule`, and the words of `Split` in `split_keys`.

    Raises:
        DataError: If an argument is not as above. `prepare_data` and `setup` raise it when folders or images are
            missing or broken.
    """

    num_classes = len(CLASSES)
    classes = CLASSES
    domain_names = DOMAINS
    split = Split(equal_domains=True)

    def __init__(self, root: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = data_folder(root, "office_caltech10")

    def prepare_data(self) -> None:
        """Looks for the folders of all classes in all domains.

        Raises:
            DataError: If one is not there.
        """
        for domain in self.domains or ():
            self._class_folders(domain)

    def find(self) -> Iterable[Domain]:
        """The domains, with all their images."""
        for domain in self.domains or ():
            yield Domain(domain, class_samples(self._class_folders(domain)))

    def _class_folders(self, domain: str) -> list[Path]:
        """One folder for each class."""
        place = self._domain_folder(domain)
        there = {folder.name: folder for folder in subfolders(place)}
        folders = []
        for label in CLASSES:
            found = next((there[name] for name in (label, *_CLASS_FOLDERS[label]) if name in there), None)
            if found is None:
                raise missing_data("Office-Caltech-10", looked_for=place / label, get=_GET)
            folders.append(found)
        return folders

    def _domain_folder(self, domain: str) -> Path:
        for name in _DOMAIN_FOLDERS.get(domain, (domain,)):
            place = self.root / name
            if place.is_dir():
                return place / "images" if (place / "images").is_dir() else place
        raise missing_data("Office-Caltech-10", looked_for=self.root / domain, get=_GET)
