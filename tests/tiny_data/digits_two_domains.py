"""MNIST's and USPS's test and training files as their publishers ship them and torchvision keeps them.

MNIST: `MNIST/raw/t10k-images-idx3-ubyte`, big-endian magic number 2051, three sizes, then bytes; labels have 2049 and
one size (yann.lecun.com/exdb/mnist). USPS: `usps.bz2` and `usps.t.bz2` in libsvm's text, `<digit + 1> 1:-1 2:0.5 ...` a
line, with 256 values from -1 to 1 (csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass.html#usps).
"""

import bz2
import struct
from pathlib import Path
from typing import Any

import numpy as np


def digits(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with a bright row for each digit: bytes (count, side, side) and labels (count,), ten digits in turn."""
    images = np.random.default_rng(seed).integers(0, 80, (count, side, side), dtype=np.uint8)
    labels = np.arange(count) % 10
    images[np.arange(count), (labels + 3) % side] = 250
    return images, labels


def write_mnist(folder: Path, count: int) -> None:
    """The four files; those for training are there, but empty."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, size in (("t10k", count), ("train", 0)):
        images, labels = digits(size, 28, 0)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, size, 28, 28) + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 2049, size) + labels.astype(np.uint8).tobytes()
        )


def write_usps(folder: Path, count: int) -> None:
    """Both files, two thirds of the images in the first."""
    images, labels = digits(count, 16, 1)
    lines = [
        f"{label + 1} " + " ".join(f"{i}:{value:.4g}" for i, value in enumerate(image.flatten() / 127.5 - 1, start=1))
        for image, label in zip(images, labels, strict=True)
    ]
    cut = 2 * count // 3
    for name, part in (("usps.bz2", lines[:cut]), ("usps.t.bz2", lines[cut:])):
        (folder / name).write_bytes(bz2.compress(("\n".join(part) + "\n").encode()))


def make(folder: Path, *, mnist: int = 150, usps: int = 120) -> dict[str, Any]:
    """The data set, and what a configuration needs for it."""
    write_mnist(folder, mnist)
    write_usps(folder, usps)
    return {
        "data.init_args.root": str(folder),
        "data.init_args.clients_per_domain": 2,
        "data.init_args.unseen_clients_per_domain": 1,
        "data.init_args.pretrain_clients_per_domain": 1,
        "data.init_args.client_size": 20,
    }
