"""FEMNIST as LEAF's preprocessing leaves it.

`data/train/all_data_<i>_niid_..._train_9.json` and likewise in `data/test`, each a dictionary of `users`, `num_samples`
and `user_data`, which has for each user `x`, lists of 784 numbers from 0 to 1 with white paper at 1, and `y`
(github.com/TalwalkarLab/leaf, data/femnist and its README). A writer's samples are in both.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WRITERS = ("f0000_14", "f0001_41", "f0002_03", "f0003_42", "f0004_11")


def writer_images(number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (count, 28, 28) and labels (count,) of one writer."""
    labels = (np.arange(count) % 4) * 20
    noise = np.random.default_rng(number).integers(0, 60, (count, 28, 28))
    return (noise + 3 * labels[:, None, None]).astype(np.uint8), labels


def write(root: Path, *, count: int = 20) -> None:
    """Five writers in two files a split; nine tenths are for training."""
    for split in ("train", "test"):
        for part, writers in enumerate((WRITERS[:3], WRITERS[3:])):
            user_data = {}
            for writer in writers:
                pixels, labels = writer_images(WRITERS.index(writer), count)
                kept = slice(None, count - count // 10) if split == "train" else slice(count - count // 10, None)
                user_data[writer] = {
                    "x": (pixels[kept].reshape(-1, 784) / 255).round(6).tolist(),
                    "y": labels[kept].tolist(),
                }
            content = {
                "users": list(writers),
                "num_samples": [len(own["y"]) for own in user_data.values()],
                "user_data": user_data,
            }
            place = root / split / f"all_data_{part}_niid_0_keep_0_{split}_9.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(content))


def write_images(root: Path, *, count: int = 20) -> None:
    """The same as a folder of images `<writer>_<label>_<number>.png`."""
    root.mkdir(parents=True, exist_ok=True)
    for number, writer in enumerate(WRITERS):
        for place, (image, label) in enumerate(zip(*writer_images(number, count), strict=True)):
            Image.fromarray(image).save(root / f"{writer}_{label}_{place}.png")


def make(folder: Path) -> dict[str, Any]:
    """The data set, and what a configuration needs for it."""
    write(folder)
    return {
        "data.init_args.root": str(folder),
        "data.init_args.seen_clients": 2,
        "data.init_args.unseen_clients": 1,
        "data.init_args.pretrain_clients": 2,
        "data.init_args.min_samples": 10,
        "model.init_args.widths": [4, 4, 4],
        "federation.client_fraction": 0.5,
        "federation.validation_fraction": 1.0,
        "pretraining.client_fraction": 0.5,
    }
