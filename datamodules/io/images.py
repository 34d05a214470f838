"""Image files of any kind, read into one array of bytes; and the augmentation that suits photographs."""

import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from fedl2p.datamodules.io.files import with_bar
from fedl2p.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["crop", "stretch"]
"""How an image becomes a square: its middle after scaling the short side, or all of it with the sides scaled apart."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 2**26
"""Larger images (8,192 pixels a side) are refused before they are decoded."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # those of the suffixes, whatever Pillow knows besides
_PATIENCE = 2.0  # seconds after which a bar appears


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, by name; hidden ones, which systems leave behind, do not count."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _is_image_name(entry.name) and entry.is_file()]
    return [folder / name for name in sorted(names)]


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def read_images(
    paths: Sequence[Path], size: int, *, fit: Fit = "crop", grayscale: bool = False, threads: int = 2
) -> Tensor:
    """Reads image files as squares of one size.

    Cameras' notes on which side is up are followed, transparent parts become white, images of several frames give
    their first. A bar on standard error shows the progress of long readings.

    Args:
        paths: The files.
        size: Side of the squares in pixels, at least 1.
        fit: ``crop`` scales the short side to `size` and cuts out the middle; ``stretch`` scales each side to `size`.
        grayscale: One channel instead of three.
        threads: Files that are decoded at a time; decoding does not hold the interpreter's lock.

    Returns:
        Shape (files, 1 or 3, size, size), uint8.

    Raises:
        DataError: If a file is missing, truncated or of another format than those of `IMAGE_SUFFIXES`, has 32 bits a
            channel or more than `MAX_PIXELS`, or an argument is not as above.
    """
    if size < 1 or fit not in get_args(Fit):
        raise DataError(f"size is {size} and fit is {fit!r}; size must be at least 1 and fit 'crop' or 'stretch'.")
    images = torch.empty(len(paths), 1 if grayscale else 3, size, size, dtype=torch.uint8)

    def read(position: int) -> None:
        images[position] = _read(paths[position], size, fit, grayscale)

    with ThreadPoolExecutor(max_workers=threads) as pool:
        readings = [pool.submit(read, position) for position in range(len(paths))]
        try:
            for reading in with_bar(readings, "Reading images", patience=_PATIENCE):
                reading.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interruption nobody wants the rest
    return images


@contextmanager
def image_errors(what: str) -> Iterator[None]:
    """Turns what Pillow raises at a broken file into a DataError that begins with `what`."""
    from PIL import Image

    try:
        yield
    # A broken file makes Pillow's decoders fail in any of these ways.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        LookupError,
        TypeError,
        ArithmeticError,
        struct.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,  # where warnings are errors
    ) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        raise DataError(f"{what} cannot be read: {reason}.") from error


def _read(path: Path, size: int, fit: Fit, grayscale: bool) -> Tensor:
    """One image, shape (1 or 3, size, size)."""
    from PIL import Image, ImageOps

    with image_errors(f"The image {path}"), Image.open(path, formats=_FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"it has {opened.width} x {opened.height} pixels; allowed are {MAX_PIXELS} together")
        # JPEG files can be decoded at a half, a quarter ... of their size; twice the wanted one keeps the quality.
        opened.draft(None, (2 * size, 2 * size))
        if opened.mode == "F" or (opened.mode == "I" and opened.format == "TIFF"):
            raise ValueError("it has 32 bits a channel, and nobody says which is white; save it with 8 or 16 bits")
        image = _flat(ImageOps.exif_transpose(opened), "L" if grayscale else "RGB")
        if fit == "crop":
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        else:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, -1).permute(2, 0, 1)


def _flat(image: "Image", mode: str) -> "Image":
    """The image in grey or in colours, 8 bits a channel, on white where it is transparent."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def flip_and_rotate(inputs: Tensor, generator: torch.Generator, *, degrees: float = 30.0) -> Tensor:
    """Mirrors every second image and turns each by up to `degrees` either way, with zeros behind.

    What FedL2P's authors do to the training images of Office-Caltech-10 and DomainNet (their code; the paper says
    nothing); here after the normalization, so that the corners become the mean colour and not black.

    Args:
        inputs: Shape (n, channels, height, width), floating point.
        generator: Source of randomness, a CPU one.
        degrees: Largest angle.

    Returns:
        The same shape; bilinear between pixels.
    """
    count, _, height, width = inputs.shape
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    angle = torch.deg2rad((2 * torch.rand(count, generator=generator) - 1) * degrees)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros(count)
    # Coordinates go from -1 to 1 along both sides, so a rotation of pixels must know how long the sides are.
    rows = [
        torch.stack([mirror * cos, -mirror * sin * height / width, zero], dim=1),
        torch.stack([sin * width / height, cos, zero], dim=1),
    ]
    transforms = torch.stack(rows, dim=1).to(inputs)
    grid = torch.nn.functional.affine_grid(transforms, list(inputs.shape), align_corners=False)
    return torch.nn.functional.grid_sample(inputs, grid, mode="bilinear", align_corners=False)
