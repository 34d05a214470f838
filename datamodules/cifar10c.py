"""CIFAR-10-C: the test images of CIFAR-10 under common corruptions, a domain each.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019).
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedl2p.datamodules.base.domains import Domain, DomainsDataModule, Samples
from fedl2p.datamodules.base.partition import IntArray, stratified_roles
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.cifar10 import CLASSES, MEAN, STD, Bytes, Labelled, as_inputs, read_cifar10
from fedl2p.datamodules.corruptions.cifar10 import COMPUTED, corrupt
from fedl2p.datamodules.io.files import data_folder, missing_data
from fedl2p.errors import DataError

CORRUPTIONS = (
    "brightness",
    "frost",
    "jpeg_compression",
    "contrast",
    "snow",
    "motion_blur",
    "pixelate",
    "speckle_noise",
    "fog",
    "saturate",
)
"""The ten of the paper."""

_SEVERITIES = 5
_GET = (
    "Unpack CIFAR-10-C.tar (2.9 GB, https://zenodo.org/records/2535967) there, of which <corruption>.npy and "
    "labels.npy are read; or leave frost out of data.init_args.domains: the other corruptions are computed from "
    "CIFAR-10's test images."
)


class CIFAR10CDataModule(DomainsDataModule):
    """Corrupted CIFAR-10: inputs of shape (3, 32, 32), normalized by channel, 10 classes, one domain a corruption.

    Each underlying image is for testing in all domains or in none, and belongs to one pool in all domains, so nobody is
    tested on an image that another trained on. The paper has 25 seen clients a domain, 250 in all, at severity 3, with
    80 % of the images for training, a fifth of them for validation (section 4.1), and a global model that was trained
    on CIFAR-10 (`pretraining.weights`).

    Args:
        root: The folder with the published `.npy` files; None is ``cifar10c`` among the data sets. Where a file is
            missing, its corruption is computed, other than frost, which needs photographs.
        cifar10_root: The folder with CIFAR-10, see `CIFAR10DataModule`; needed for computed corruptions only.
        severity: 1 to 5.
        **options: `batch_size`, and the words of `Split` in `split_keys`; `domains` are corruptions.

    Raises:
        DataError: If an argument is not as above. `prepare_data` and `setup` raise it when files are missing or broken.
    """

    num_classes = len(CLASSES)
    classes = CLASSES
    mean = MEAN
    std = STD
    same_samples = True
    split = Split(domains=CORRUPTIONS, alpha=0.5, clients_per_domain=25)

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        cifar10_root: str | os.PathLike[str] | None = None,
        severity: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 1 <= severity <= _SEVERITIES:
            raise DataError(f"severity is {severity}; it must be from 1 to {_SEVERITIES}.")
        self.severity = severity
        self.root = data_folder(root, "cifar10c")
        self.cifar10_root = data_folder(cifar10_root, "cifar10")

    def prepare_data(self) -> None:
        """Looks for the files.

        Raises:
            DataError: If neither a corruption's file is there nor what it is computed from.
        """
        missing = self._missing()
        if any(name not in COMPUTED for name in missing):
            place = self._file(next(name for name in missing if name not in COMPUTED))
            raise missing_data("CIFAR-10-C", looked_for=place, get=_GET)
        if missing:
            read_cifar10(self.cifar10_root, only_test=True)

    def find(self) -> Iterable[Domain]:
        """The corruptions; a sample's key is its image."""
        missing = self._missing()
        clean = read_cifar10(self.cifar10_root, only_test=True)["test"] if missing else None
        for name in self.domains or ():
            images, labels = self._computed(name, clean) if name in missing and clean else self._published(name)
            train, test = self._roles(labels)
            samples = Samples(list(images), labels)
            yield Domain(name, samples.take(train), samples.take(test))

    def read(self, keys: Sequence[Bytes]) -> Tensor:
        """Shape (n, 3, 32, 32), uint8."""
        return as_inputs(np.stack(keys))

    def _file(self, name: str) -> Path:
        return self.root / f"{name}.npy"

    def _missing(self) -> list[str]:
        """The corruptions whose files are not there; none is without the labels."""
        complete = self._file("labels").is_file()
        return [name for name in self.domains or () if not (complete and self._file(name).is_file())]

    def _published(self, name: str) -> Labelled:
        labels, images = (self._array(key) for key in ("labels", name))
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(
                f"{self._file('labels')} holds {labels.dtype} of shape {labels.shape}; it must be a number each."
            )
        count = len(labels) // _SEVERITIES
        if images.shape != (len(labels), 32, 32, 3) or images.dtype != np.uint8 or count * _SEVERITIES != len(labels):
            raise DataError(
                f"{self._file(name)} holds {images.dtype} of shape {images.shape}, and there are {len(labels)} labels; "
                "it must be bytes of shape (labels, 32, 32, 3), in five severities."
            )
        block = slice(count * (self.severity - 1), count * self.severity)
        return np.asarray(images[block]), labels[block].astype(np.int64)

    def _array(self, name: str) -> np.ndarray:
        try:
            # Mapped, since of 150 MB a fifth is wanted.
            found: np.ndarray = np.load(self._file(name), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self._file(name)} cannot be read: {error}") from error
        return found

    def _computed(self, name: str, clean: Labelled) -> Labelled:
        return corrupt(clean[0], name, self.severity, self._rng(3, name)), clean[1]

    def _roles(self, labels: IntArray) -> tuple[IntArray, IntArray]:
        """Which images are for training and validation, and which for testing: the same in every domain."""
        train, test = stratified_roles(
            labels, [1 - self.split.test_fraction, self.split.test_fraction], self._rng(3, "")
        )
        return train, test
