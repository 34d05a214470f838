"""Small image files for tests: noise of a colour that tells the class, so that something can be learned."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, *, size: tuple[int, int] = (12, 9), seed: int = 0) -> Path:
    """An image file, (width, height) pixels; its folder's name decides the colour."""
    rng = np.random.default_rng([zlib.crc32(path.parent.name.encode()), seed])
    colour = np.random.default_rng(zlib.crc32(path.parent.name.encode())).integers(60, 196, 3)
    pixels = np.clip(colour + rng.integers(-60, 60, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
