"""Office-Caltech-10 as FedBN's archive has it: `<domain>/<class>/frame_0001.jpg`, in caltech `backpack_0001.jpg`.

The classes' names are Office-31's (back_pack, laptop_computer); the listing is the one that FedBN's code reads
(github.com/med-air/FedBN, utils/data_utils.py: amazon, caltech, dslr, webcam and its `label_dict`).
"""

from pathlib import Path
from typing import Any

from tiny_data.images import write_image

CLASSES = (
    "back_pack",
    "bike",
    "calculator",
    "headphones",
    "keyboard",
    "laptop_computer",
    "monitor",
    "mouse",
    "mug",
    "projector",
)


def make(folder: Path, *, images: int = 2) -> dict[str, Any]:
    """The data set, and what a configuration needs for it."""
    for domain, more in (("amazon", 1), ("caltech", 2), ("dslr", 0), ("webcam", 1)):
        for label in CLASSES:
            for number in range(1, images + more + 1):
                name = f"{label}_{number:04d}.jpg" if domain == "caltech" else f"frame_{number:04d}.jpg"
                write_image(folder / domain / label / name, seed=number)
    return {
        "data.init_args.root": str(folder),
        "data.init_args.image_size": 8,
        "model.init_args.weights": "null",  # nothing is downloaded in tests
        "pretraining.pool": "seen",  # for tests that ask for a round of pretraining
    }
