"""A user's own images in `<domain>/<class>/`."""

from pathlib import Path
from typing import Any

from tiny_data.images import write_image


def make(folder: Path, *, images: int = 12) -> dict[str, Any]:
    """The data set, and what a configuration needs for it."""
    for domain in ("hospital_a", "hospital_b"):
        for label in ("cat", "dog", "owl"):
            for number in range(images):
                write_image(folder / domain / label / f"{number}.png", seed=number)
    return {
        "data.init_args.root": str(folder),
        "data.init_args.image_size": 16,
        "data.init_args.clients_per_domain": 2,
        "data.init_args.unseen_clients_per_domain": 1,
        "data.init_args.pretrain_clients_per_domain": 1,
    }
