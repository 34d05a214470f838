"""DomainNet as its archives and lists have it, with the ten classes of FedBN and one more.

Published as `clipart/aircraft_carrier/clipart_001_000018.jpg 0` a line in `clipart_train.txt` (ai.bu.edu/M3SDA, cleaned
version): a file's name has the class number, from 1, and the line has it from 0. The numbers here only keep the order.
"""

from pathlib import Path
from typing import Any

from tiny_data.images import write_image

from fedl2p.datamodules.domainnet import CLASSES, DOMAINS

PUBLISHED = ("aircraft_carrier", *CLASSES)


def make(folder: Path, *, train: int = 6, test: int = 3) -> dict[str, Any]:
    """The data set, and what a configuration needs for it."""
    for position, domain in enumerate(DOMAINS):
        lists: dict[str, list[str]] = {"train": [], "test": []}
        for number, label in enumerate(PUBLISHED):
            for image in range(1, train + test + position % 3 + 1):
                name = f"{domain}/{label}/{domain}_{number + 1:03d}_{image:06d}.jpg"
                write_image(folder / name, seed=image)
                lists["train" if image > test else "test"].append(f"{name} {number}\n")
        for split, lines in lists.items():
            (folder / f"{domain}_{split}.txt").write_text("".join(lines))
    return {
        "data.init_args.root": str(folder),
        "data.init_args.image_size": 8,
        "data.init_args.clients_per_domain": 1,
        "model.init_args.weights": "null",  # nothing is downloaded in tests
        "pretraining.pool": "seen",  # for tests that ask for a round of pretraining
    }
