"""Office-Caltech-10: ten kinds of office objects as four sources show them.

Gong, Shi, Sha and Grauman, "Geodesic Flow Kernel for Unsupervised Domain Adaptation" (CVPR 2012): the classes that
Office-31 (Saenko et al. 2010) and Caltech-256 (Griffin et al. 2007) have in common. 2,533 images.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedl2p.datamodules.base.domains import Domain
from fedl2p.datamodules.image_folder import ImageDomainsDataModule, class_samples, subfolders
from fedl2p.datamodules.io.files import data_folder, missing_data
from fedl2p.datamodules.io.images import Fit
from fedl2p.errors import DataError

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
        batch_size: Samples in a client's training batch, at least 1.
        seed: Fixes which images are kept and who has them. At least 0.
        domains: Some of amazon, caltech, dslr and webcam.
        image_size: Side of the images in pixels; the paper's network was trained on 224.
        fit: ``stretch`` keeps all of an image, ``crop`` its proportions.
        augment: Mirror and turn training images.
        alpha: Dirichlet concentration inside domains, for more than one client a domain; None is no skew.
        clients_per_domain: See `DomainsDataModule`, as all that follow.
        unseen_clients_per_domain: Of the unseen pool; the domain's images are then divided.
        pretrain_clients_per_domain: Of the pretrain pool, likewise; the paper starts from ImageNet's weights instead.
        client_size: Images of a client.
        val_fraction: Of what is not for testing.
        test_fraction: Of a client's images.
        equal_domains: Cut every domain to the smallest.

    Raises:
        DataError: If an argument is not as above. `prepare_data` and `setup` raise it when folders or images are
            missing or broken.
    """

    num_classes = len(CLASSES)
    classes = CLASSES

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 32,
        seed: int = 0,
        domains: Sequence[str] = DOMAINS,
        image_size: int = 224,
        fit: Fit = "stretch",
        augment: bool = True,
        alpha: float | None = None,
        clients_per_domain: int = 1,
        unseen_clients_per_domain: int = 0,
        pretrain_clients_per_domain: int = 0,
        client_size: int | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        equal_domains: bool = True,
    ) -> None:
        unknown = [name for name in domains if name not in DOMAINS]
        if unknown:
            raise DataError(f"There is no domain {unknown[0]!r}; the domains are {', '.join(DOMAINS)}.")
        super().__init__(
            domains,
            image_size=image_size,
            fit=fit,
            augment=augment,
            batch_size=batch_size,
            seed=seed,
            alpha=alpha,
            clients_per_domain=clients_per_domain,
            unseen_clients_per_domain=unseen_clients_per_domain,
            pretrain_clients_per_domain=pretrain_clients_per_domain,
            client_size=client_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            equal_domains=equal_domains,
        )
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
