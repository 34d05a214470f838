"""Shifts of image data that grow with a severity from 0 (nothing) to 1 (strong), for small grey images.

The idea of one data set under several corruptions and severities is that of CIFAR-10-C (Hendrycks and
Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019).
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedl2p.errors import DataError

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]

CORRUPTIONS: dict[str, Corruption] = {}
"""Every kind by name: ``CORRUPTIONS[kind](images, severity, generator)``.

Images are floats in [0, 1] of shape (N, C, H, W), severity is in [0, 1] (else DataError). The result has the
same shape and range; at severity 0 it is the images themselves. Only the kinds that are random use the
generator.
"""


def _corruption(function: Corruption) -> Corruption:
    """Registers a kind under its function's name, with the promises that all kinds share."""
    kind = getattr(function, "__name__", "")

    @functools.wraps(function)
    def checked(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
        if images.ndim != 4 or not images.is_floating_point():
            raise DataError(
                f"{kind!r} was given {images.dtype} images of shape {tuple(images.shape)}; "
                "they must be floats of shape (N, C, H, W)."
            )
        if not 0 <= severity <= 1:
            raise DataError(f"The severity of {kind!r} is {severity}; it must be in [0, 1].")
        return images if severity == 0 else function(images, severity, generator).clamp(0, 1)

    CORRUPTIONS[kind] = checked
    return checked


@_corruption
def noise(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Adds Gaussian noise of standard deviation 0.5 * severity to each pixel."""
    values = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return images + 0.5 * severity * values


@_corruption
def blur(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Smooths with a Gaussian of sigma 1.2 * severity pixels; the border's pixels go on outside."""
    offsets = torch.arange(-3, 4, dtype=images.dtype)
    kernel = torch.softmax(-0.5 * (offsets / (1.2 * severity)) ** 2, dim=0)
    return _smooth_rows(_smooth_rows(images, kernel).mT, kernel).mT.contiguous()


def _smooth_rows(images: Tensor, kernel: Tensor) -> Tensor:
    """Weighs the 7 pixels around each along the last axis; many times faster than a convolution when tiny."""
    columns = torch.arange(images.shape[-1])
    total = torch.zeros_like(images)
    for offset, weight in zip(range(-3, 4), kernel, strict=True):
        total += weight * images[..., (columns + offset).clamp(0, len(columns) - 1)]
    return total


@_corruption
def contrast(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Pulls pixels towards mid grey; severity 1 keeps 15 % of the contrast."""
    return 0.5 + (1 - 0.85 * severity) * (images - 0.5)


@_corruption
def brightness(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Adds 0.6 * severity to each pixel."""
    return images + 0.6 * severity


@_corruption
def rotation(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Turns by 60 * severity degrees around the centre, bilinear; what comes in from outside is black."""
    height, width = images.shape[-2:]
    angle = math.radians(60 * severity)
    sin, cos = math.sin(angle), math.cos(angle)
    # The grid's units are half an image side, so the aspect ratio enters the turn.
    turn = torch.tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]], dtype=images.dtype)
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@_corruption
def inversion(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Each pixel's distance to the severity: the background gets bright, and severity 1 is the negative.

    A blend of the image and its negative would lose the image in uniform grey at one half; this does not.
    """
    return (severity - images).abs()
