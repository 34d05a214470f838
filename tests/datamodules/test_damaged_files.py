"""Files with any bytes changed or cut off: they are read, or refused by our own error, and nothing else happens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny_data import cifar10, digits_two_domains, femnist, tensors

from fedl2p.datamodules import CIFAR10DataModule, DigitsTwoDomainsDataModule, FEMNISTDataModule, TensorsDataModule
from fedl2p.datamodules.io.images import read_images
from fedl2p.datamodules.io.mfcc import Clip, cached_mfcc
from fedl2p.errors import DataError

COLUMNS = {name: column for name, column in tensors.columns().items() if name != "domain"}


def image(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)


def sound(path: Path) -> None:
    soundfile.write(path, np.random.default_rng(0).normal(scale=0.1, size=8000), 8000)


def two_domains(path: Path) -> None:
    (mnist, labels), (usps, more) = digits_two_domains.digits(60, 28, 0), digits_two_domains.digits(60, 16, 1)
    np.savez(path, mnist_images=mnist, mnist_labels=labels, usps_images=usps, usps_labels=more)


def letters(path: Path) -> None:
    images, labels = femnist.writer_images(0, 12)
    own = {"x": (images.reshape(12, -1) / 255).round(2).tolist(), "y": labels.tolist()}
    path.write_text(json.dumps({"users": ["a"], "num_samples": [12], "user_data": {"a": own}}))


WRITERS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys(("a.png", "a.jpg", "a.gif", "a.bmp", "a.tif", "a.webp", "a.ppm"), image),
    **dict.fromkeys(("a.wav", "a.flac"), sound),
    "columns.npz": lambda path: np.savez(path, **COLUMNS),
    "columns.safetensors": lambda path: save_file({k: torch.from_numpy(v) for k, v in COLUMNS.items()}, path),
    "columns.pt": lambda path: torch.save({k: torch.from_numpy(v) for k, v in COLUMNS.items()}, path),
    "cifar10_jpeg.npz": lambda path: cifar10.write_jpeg(path, train=30, test=20),
    "digits_mnist_usps.npz": two_domains,
    "letters.json": letters,
}


def load(path: Path) -> None:
    """As the data module of such files does, up to the last look at the samples."""
    if path.name.startswith("a."):
        read_images([path], 8) if path.suffix not in (".wav", ".flac") else cached_mfcc([Clip(path)], path.parent)
        return
    modules: dict[str, Any] = {
        "columns": lambda: TensorsDataModule(path),
        "cifar10_jpeg": lambda: CIFAR10DataModule(path, seen_clients=2),
        "digits_mnist_usps": lambda: DigitsTwoDomainsDataModule(
            path, clients_per_domain=2, unseen_clients_per_domain=0, pretrain_clients_per_domain=0, client_size=None
        ),
        "letters": lambda: FEMNISTDataModule(path.parent, seen_clients=1, unseen_clients=0, min_samples=3),
    }
    data = modules[path.stem]()
    data.prepare_data()
    data.check()


@st.composite
def damages(draw: st.DrawFn) -> tuple[float, list[tuple[float, int]]]:
    """Where the file is cut, and bytes that are replaced; places are shares of the length."""
    places = st.floats(0, 1, exclude_max=True)
    cut = draw(st.one_of(st.just(1.0), places))
    return cut, draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=cut == 1.0, max_size=12))


def check_damages(name: str, folder: Path, examples: int) -> None:
    path = folder / name
    WRITERS[name](path)
    whole = path.read_bytes()
    load(path)

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(damages())
    def each(damage: tuple[float, list[tuple[float, int]]]) -> None:
        cut, changes = damage
        content = bytearray(whole[: int(cut * len(whole))])
        for place, value in changes:
            if content:
                content[int(place * len(content))] = value
        path.write_bytes(content)
        message = ""
        try:
            load(path)
        except DataError as error:
            message = str(error)
        assert "\n" not in message.strip()

    each()
    assert {found.name for found in folder.iterdir()} <= {name, ".fedl2p-cache"}


# Pillow and torch warn of what they read on regardless; that is for the user to see.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    check_damages(name, tmp_path, 25)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_a_thousand_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    check_damages(name, tmp_path, 1000)
