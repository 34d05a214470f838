"""FEMNIST: handwritten digits and letters by writer.

Caldas et al., "LEAF: A Benchmark for Federated Settings" (2018), from NIST Special Database 19: 28x28 images of 62
classes: the digits, then the capital, then the small letters.
"""

import json
import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedl2p.datamodules.base.domains import Samples
from fedl2p.datamodules.base.people import People, PeopleDataModule
from fedl2p.datamodules.base.split import Split
from fedl2p.datamodules.io.files import data_folder, missing_data, with_bar
from fedl2p.datamodules.io.images import image_files, read_images
from fedl2p.errors import DataError

_SIDE = 28
_GET = (
    "Run `./preprocess.sh -s niid --sf 1.0 -k 0 -t sample` in data/femnist of https://github.com/TalwalkarLab/leaf (it "
    "fetches NIST's Special Database 19, 1 GB) and put its folders data/train and data/test there; or a folder of "
    "images <writer>_<label>_<number>.png."
)


class FEMNISTDataModule(PeopleDataModule):
    """Inputs of shape (1, 28, 28) in [0, 1] on a white ground, 62 classes, one client a writer.

    LEAF's own division into train and test is undone: all of a writer's images are divided again, with the same labels
    in every role.

    Args:
        root: The folder with LEAF's JSON files (in `train` and `test`, or `all_data`, or right there), or with images;
            None is ``femnist`` among the data sets.
        **options: `batch_size`, and the words of `Split` in `split_keys`.

    Raises:
        DataError: If an argument is not as above. `prepare_data` and `setup` raise it when files are missing or broken.
    """

    num_classes = 62
    classes = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
    split = Split(seen_clients=200, unseen_clients=50, min_samples=50)

    def __init__(self, root: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = data_folder(root, "femnist")

    def prepare_data(self) -> None:
        """Looks for the files.

        Raises:
            DataError: If they are not there.
        """
        if not self._json_files() and not (self.root.is_dir() and image_files(self.root)):
            raise missing_data("FEMNIST", looked_for=self.root, get=_GET)

    def find(self) -> People:
        """The writers; a sample's key is its image, or the image's file."""
        self.prepare_data()
        files = self._json_files()
        samples = _from_json(files) if files else _from_images(image_files(self.root))
        return People(samples, list(samples), list(samples))

    def read(self, keys: Sequence[np.ndarray | Path]) -> Tensor:
        """Shape (n, 1, 28, 28), uint8."""
        if isinstance(keys[0], Path):
            return read_images([Path(str(key)) for key in keys], _SIDE, fit="stretch", grayscale=True)
        return torch.from_numpy(np.stack([np.asarray(key) for key in keys]).reshape(-1, 1, _SIDE, _SIDE))

    def _json_files(self) -> list[Path]:
        folders = (self.root / "train", self.root / "test", self.root / "all_data", self.root)
        return [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.json"))]


def _from_json(files: Sequence[Path]) -> dict[str, Samples]:
    """LEAF's files: `user_data` by writer, with `x`, lists of 784 numbers from 0 to 1, and `y`."""
    images: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[int]] = {}
    for path in with_bar(files, "Reading FEMNIST"):
        try:
            writers = json.loads(path.read_bytes())["user_data"]
            for writer, own in writers.items():
                pixels = np.asarray(own["x"], dtype=np.float64).reshape(-1, _SIDE * _SIDE)
                images.setdefault(writer, []).extend(np.rint(255 * pixels).clip(0, 255).astype(np.uint8))
                labels.setdefault(writer, []).extend(_checked(int(y), path) for y in own["y"])
                if len(images[writer]) != len(labels[writer]):
                    raise ValueError(
                        f"writer {writer} has {len(images[writer])} images and {len(labels[writer])} labels"
                    )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is none of LEAF's files of FEMNIST: {type(error).__name__}: {error}") from error
    return {writer: Samples(images[writer], np.array(labels[writer], dtype=np.int64)) for writer in images}


def _from_images(paths: Sequence[Path]) -> dict[str, Samples]:
    """Images whose names say the writer and the label."""
    by_writer: dict[str, list[tuple[Path, int]]] = {}
    for path in paths:
        writer, _, rest = path.stem.rpartition("_")[0].rpartition("_")
        if not writer or not rest.isdecimal():
            raise DataError(f"The image {path} is not called <writer>_<label>_<number>.")
        by_writer.setdefault(writer, []).append((path, _checked(int(rest), path)))
    return {
        writer: Samples([path for path, _ in own], np.array([label for _, label in own], dtype=np.int64))
        for writer, own in by_writer.items()
    }


def _checked(label: int, path: Path) -> int:
    if not 0 <= label < FEMNISTDataModule.num_classes:
        raise DataError(f"{path} has the label {label}; labels are 0 to {FEMNISTDataModule.num_classes - 1}.")
    return label
