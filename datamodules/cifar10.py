"""CIFAR-10 with label skew between clients.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009): 60,000 photographs of 32x32 in ten classes.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedl2p.datamodules.base.arrays import crop_and_flip
from fedl2p.datamodules.base.domains import Domain, DomainsDataModule, Samples
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.io.cifar10 import JPEG_FILE, Bytes, as_inputs, read_cifar10
from fedl2p.datamodules.io.files import data_folder
from fedl2p.errors import DataError

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_LOGGER = logging.getLogger(__name__)


class CIFAR10DataModule(DomainsDataModule):
    """CIFAR-10: inputs of shape (3, 32, 32), normalized by channel, 10 classes.

    The training images are dealt to all clients, of whatever pool, by a Dirichlet distribution, and a client's
    validation set is a part of its own; the published test images are dealt so that each client is tested on its own
    labels again. The paper has 1,000 seen clients of 40 + 10 + 10 images, at alpha 1000, 1.0, 0.5 and 0.1 (section
    4.1), and trains the global model on the same ones (`pretraining.pool: seen`).

    Args:
        root: The folder with CIFAR-10; None is ``cifar10`` among the data sets.
        download: Fetch what is missing by torchvision.
        published: Which of the published parts is divided among the clients. ``train`` is as above. ``test`` takes the
            10,000 test images for all three roles: for a global model that was trained on the training images.
        augment: Shift and mirror the images of training batches.
        samples_per_client: The old name of `client_size`.
        **options: `batch_size`, and the words of `Split` in `split_keys`; `test_fraction` is for ``published="test"``.

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
        "test_fraction",
    )

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        download: bool = False,
        published: str = "train",
        augment: bool = False,
        samples_per_client: int | None = None,
        **options: Any,
    ) -> None:
        if samples_per_client is not None:
            _LOGGER.warning("samples_per_client is now called client_size; the old name goes with the next release.")
            options.setdefault("client_size", samples_per_client)
        super().__init__(**options)
        if published not in ("train", "test"):
            raise DataError(f"published is {published!r}; it must be 'train' or 'test'.")
        self.published = published
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
        only_test = self.published == "test"
        found = read_cifar10(self.root, only_test=True) if only_test else read_cifar10(self.root)
        parts = {name: Samples(list(images), labels) for name, (images, labels) in found.items()}
        yield Domain("cifar10", parts[self.published], None if only_test else parts["test"])

    def read(self, keys: Sequence[Bytes]) -> Tensor:
        """Shape (n, 3, 32, 32), uint8."""
        return as_inputs(np.stack(keys))
