"""CIFAR-10-C as its publisher ships it.

`CIFAR-10-C.tar` holds a folder of `<corruption>.npy`, uint8 (50000, 32, 32, 3): five severities of 10,000 test images,
one after the other, and `labels.npy`, (50000,) (zenodo.org/records/2535967).
"""

from pathlib import Path
from typing import Any

import numpy as np
from tiny_data.cifar10 import images

NAMES = ("frost", "fog")


def write(root: Path, *, count: int = 60, names: tuple[str, ...] = NAMES) -> None:
    """The files; an image's first pixel says its severity and its number."""
    root.mkdir(parents=True, exist_ok=True)
    pixels, labels = images(count, 0)
    for name in names:
        blocks = np.concatenate([pixels.transpose(0, 2, 3, 1)] * 5)
        blocks[:, 0, 0, 0] = np.repeat(np.arange(1, 6), count)
        blocks[:, 0, 0, 1] = np.tile(np.arange(count), 5)
        np.save(root / f"{name}.npy", blocks)
    np.save(root / "labels.npy", np.tile(labels, 5).astype(np.uint8))


def make(folder: Path) -> dict[str, Any]:
    """The data set, and what a configuration needs for it."""
    write(folder)
    return {
        "data.init_args.root": str(folder),
        "data.init_args.domains": list(NAMES),
        "data.init_args.clients_per_domain": 2,
        "data.init_args.unseen_clients_per_domain": 1,
        "federation.client_fraction": 0.5,
        "federation.validation_fraction": 1.0,
        "pretraining.client_fraction": 0.5,
    }
