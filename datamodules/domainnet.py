"""DomainNet: things as six kinds of pictures show them; here ten classes of its 345.

Peng et al., "Moment Matching for Multi-Source Domain Adaptation" (ICCV 2019), http://ai.bu.edu/M3SDA, cleaned version:
586,575 images in six archives of 17.5 GB, each with a list of training and one of test images.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedl2p.datamodules.base.domains import Domain, Samples
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.image_folder import ImageDomainsDataModule
from fedl2p.datamodules.io.files import data_folder, missing_data
from fedl2p.errors import DataError

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
CLASSES = (
    "bird",
    "feather",
    "headphones",
    "ice_cream",
    "teapot",
    "tiger",
    "whale",
    "windmill",
    "wine_glass",
    "zebra",
)
"""The ten most common classes by Li et al., "FedBN" (ICLR 2021), which the FedL2P paper follows; from FedBN's code."""

_SERVER = "http://csr.bu.edu/ftp/visda/2019/multi-source"
_GET = (
    "Download the cleaned version from http://ai.bu.edu/M3SDA (for each domain an archive, 17.5 GB together: "
    f"{_SERVER}/groundtruth/clipart.zip and painting.zip, {_SERVER}/infograph.zip, quickdraw.zip, real.zip and "
    f"sketch.zip; and two lists, {_SERVER}/domainnet/txt/<domain>_train.txt and <domain>_test.txt), and unpack "
    "everything there."
)


class DomainNetDataModule(ImageDomainsDataModule):
    """Inputs of shape (3, image_size, image_size), 10 classes, 6 domains; FedL2P's paper has 25 clients in each.

    Training and validation images are from the publisher's list for training, test images from that for testing, as in
    FedBN and in the code of FedL2P's authors (who read FedBN's own selection of these images, which is a pickle). Both
    lists are cut to the size of the smallest domain's: the paper says that domains have equal sizes; its code cuts the
    training images alone. The paper does not say how images are made square: its code stretches them to 256 pixels, and
    turns and mirrors those for training.

    The folder holds ``<domain>/<class>/<file>``, and ``<domain>_train.txt`` and ``<domain>_test.txt`` (there or in
    ``splits``), whose lines are ``<domain>/<class>/<file> <number>``; the number is not used.

    Args:
        root: The folder; None looks for ``domainnet`` among the data sets.
        classes: Names of classes; a label is a position here.
        **options: `batch_size`, arguments of `ImageDomainsDataModule`, and the words of `Split` in `split_keys`.

    Raises:
        DataError: If an argument is not as above. `prepare_data` and `setup` raise it when lists or images are missing
            or broken, or a list has no image of a class.
    """

    domain_names = DOMAINS
    split = Split(alpha=1.0, clients_per_domain=25, equal_domains=True)
    split_keys = tuple(key for key in ImageDomainsDataModule.split_keys if key != "test_fraction")

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        classes: Sequence[str] = CLASSES,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not classes or len(set(classes)) < len(classes):
            raise DataError(f"The classes are {list(classes)}; name at least one, and each at most once.")
        self.root = data_folder(root, "domainnet")
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)

    def prepare_data(self) -> None:
        """Looks for the lists and for the folders of images.

        Raises:
            DataError: If one is not there.
        """
        for domain in self.domains or ():
            for split in ("train", "test"):
                self._list(domain, split)
            if not (self.root / domain).is_dir():
                raise missing_data("DomainNet", looked_for=self.root / domain, get=_GET)

    def find(self) -> Iterable[Domain]:
        """The domains, with the images of the wanted classes."""
        for domain in self.domains or ():
            yield Domain(domain, self._listed(domain, "train"), self._listed(domain, "test"))

    def _list(self, domain: str, split: str) -> Path:
        name = f"{domain}_{split}.txt"
        for place in (self.root / name, self.root / "splits" / name):
            if place.is_file():
                return place
        raise missing_data("DomainNet", looked_for=self.root / name, get=_GET)

    def _listed(self, domain: str, split: str) -> Samples:
        """The images of the wanted classes in a list, in its order."""
        numbers = {label: number for number, label in enumerate(self.classes)}
        place = self._list(domain, split)
        paths, labels = [], []
        for position, line in enumerate(place.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            # File names have no spaces, but nothing is lost by allowing them.
            parts = line.rpartition(" ")[0].strip().split("/")
            if line.strip() and len(parts) != 3:
                raise DataError(f"Line {position} of {place} is {line!r}; it must be <domain>/<class>/<file> <number>.")
            if line.strip() and parts[1] in numbers:
                paths.append(self.root.joinpath(*parts))
                labels.append(numbers[parts[1]])
        missing = sorted(set(range(self.num_classes)) - set(labels))
        if missing:
            raise DataError(f"{place} lists no image of the class {self.classes[missing[0]]!r}.")
        return Samples(paths, np.array(labels, dtype=np.int64))
