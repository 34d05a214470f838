"""CIFAR-10's python version as its publisher ships it.

A folder `cifar-10-batches-py` with `data_batch_1` to `data_batch_5`, `test_batch` and `batches.meta`, each a pickled
dictionary: `data` is uint8 (n, 3072), the red plane before the green and the blue one, `labels` a list of n numbers;
`batches.meta` has `label_names` (cs.toronto.edu/~kriz/cifar.html). torchvision compares the files' MD5 sums with those
of the real ones, which tests have to replace by those of these files.
"""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (count, 3, 32, 32), brighter for higher classes, and labels (count,), ten classes in turn."""
    labels = np.arange(count) % 10
    noise = np.random.default_rng(seed).integers(0, 40, (count, 3, 32, 32))
    return (noise + 20 * labels[:, None, None, None]).astype(np.uint8), labels


def write(root: Path, *, train: int = 200, test: int = 100) -> dict[str, str]:
    """The batches; returns the MD5 sum of each file."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    contents: dict[str, Any] = {}
    for number in range(1, 6):
        pixels, labels = images(train // 5, number)
        contents[f"data_batch_{number}"] = {"data": pixels.reshape(len(pixels), -1), "labels": labels.tolist()}
    pixels, labels = images(test, 0)
    contents["test_batch"] = {"data": pixels.reshape(len(pixels), -1), "labels": labels.tolist()}
    contents["batches.meta"] = {"label_names": CLASSES, "num_cases_per_batch": train // 5, "num_vis": 3072}
    sums = {}
    for name, content in contents.items():
        encoded = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(encoded)
        sums[name] = hashlib.md5(encoded).hexdigest()
    return sums


def make(folder: Path) -> dict[str, Any]:
    """The data set with JPEG bytes, which need no sums, and what a configuration needs for it."""
    write_jpeg(folder / "cifar10_jpeg.npz")
    return {
        "data.init_args.root": str(folder),
        "data.init_args.seen_clients": 4,
        "data.init_args.unseen_clients": 2,
        "data.init_args.client_size": 10,
        "federation.client_fraction": 0.5,
        "federation.validation_fraction": 1.0,
        "pretraining.client_fraction": 0.5,
    }


def write_jpeg(path: Path, *, train: int = 100, test: int = 50) -> None:
    """JPEG bytes end to end, with offsets, labels, splits and class names."""
    import io

    from PIL import Image

    pieces, all_labels = [], []
    for count, seed in ((train, 1), (test, 0)):
        pixels, labels = images(count, seed)
        all_labels.append(labels)
        for image in pixels.transpose(0, 2, 3, 1):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "JPEG", quality=90)
            pieces.append(stream.getvalue())
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(pieces), dtype=np.uint8),
        offsets=np.cumsum([0, *map(len, pieces)]),
        labels=np.concatenate(all_labels),
        split=np.array(["train"] * train + ["test"] * test),
        classes=np.array(CLASSES),
    )
