"""Common corruptions of 32x32 images, for where the published files of CIFAR-10-C are not at hand.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019),
with the strengths of that work's generator for CIFAR-10. Random draws differ from the published files, and blurs follow
the nearest pixels. Frost is made of photographs that come with that generator, so it cannot be computed here.
"""

import io
from collections.abc import Callable

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import zoom

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

_GREY = np.array([0.299, 0.587, 0.114])


def _brightness(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    hsv = rgb_to_hsv(images)
    hsv[..., 2] = np.clip(hsv[..., 2] + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 0, 1)
    return hsv_to_rgb(hsv)


def _saturate(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    factor, added = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    hsv = rgb_to_hsv(images)
    hsv[..., 1] = np.clip(hsv[..., 1] * factor + added, 0, 1)
    return hsv_to_rgb(hsv)


def _contrast(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    means = images.mean(axis=(1, 2), keepdims=True)
    return (images - means) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + means


def _speckle_noise(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    return images + images * rng.normal(scale=(0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1], size=images.shape)


def _fog(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    strength, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    brightest = images.max(axis=(1, 2, 3), keepdims=True)
    clouds = _clouds(len(images), images.shape[1], decay, rng)
    return (images + strength * clouds[..., None]) * brightest / (brightest + strength)


def _snow(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    mean, deviation, size, least, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    flakes = _zoomed(rng.normal(mean, deviation, images.shape[:3]), size)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = _blurred(flakes[..., None], radius, sigma, rng.uniform(-135, -45, len(images)))
    white = np.maximum(images, (images @ _GREY)[..., None] * 1.5 + 0.5)
    return kept * images + (1 - kept) * white + flakes + flakes[:, ::-1, ::-1]


def _motion_blur(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    return _blurred(images, radius, sigma, rng.uniform(-45, 45, len(images)))


def _zoomed(layers: Floats, factor: float) -> Floats:
    """The middle of each layer (n, side, side), enlarged to the whole."""
    side = layers.shape[1]
    kept = int(np.ceil(side / factor))
    start = (side - kept) // 2
    enlarged = zoom(layers[:, start : start + kept, start : start + kept], (1, factor, factor), order=1)
    trim = (enlarged.shape[1] - side) // 2
    return enlarged[:, trim : trim + side, trim : trim + side]


def _blurred(images: Floats, radius: int, sigma: float, degrees: Floats) -> Floats:
    """Each image (n, side, side, channels) smeared in a direction of its own, with weights of half a normal curve."""
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights /= weights.sum()
    angles = np.deg2rad(degrees)
    count, side = images.shape[:2]
    rows, columns, each = (
        np.arange(side)[None, :, None],
        np.arange(side)[None, None, :],
        np.arange(count)[:, None, None],
    )
    result = np.zeros_like(images)
    for tap, weight in zip(taps, weights, strict=True):
        down, right = (np.rint(tap * part(angles)).astype(int)[:, None, None] for part in (np.sin, np.cos))
        result += weight * images[each, np.clip(rows + down, 0, side - 1), np.clip(columns + right, 0, side - 1)]
    return result


def _clouds(count: int, side: int, decay: float, rng: np.random.Generator) -> Floats:
    """Height maps in [0, 1] by midpoint displacement on a torus, shape (count, side, side); `side` a power of two."""
    heights = np.zeros((count, side, side))
    step, wildness = side, 100.0
    while step >= 2:
        half = step // 2

        def displaced(total: Floats, wildness: float = wildness) -> Floats:
            return total / 4 + wildness * rng.uniform(-wildness, wildness, total.shape)

        corners = heights[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, half::step] = displaced(pairs + np.roll(pairs, -1, axis=2))
        middles = heights[:, half::step, half::step]
        beside = corners + np.roll(corners, -1, axis=2)
        heights[:, ::step, half::step] = displaced(middles + np.roll(middles, 1, axis=1) + beside)
        below = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, ::step] = displaced(middles + np.roll(middles, 1, axis=2) + below)
        step, wildness = half, wildness / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return heights / heights.max(axis=(1, 2), keepdims=True)


def _jpeg_compression(image: Image.Image, severity: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
    return Image.open(stream)


def _pixelate(image: Image.Image, severity: int) -> Image.Image:
    size = image.size
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    small = image.resize((int(size[0] * share), int(size[1] * share)), Image.Resampling.BOX)
    return small.resize(size, Image.Resampling.BOX)


_OF_ARRAYS: dict[str, Callable[[Floats, int, np.random.Generator], Floats]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "fog": _fog,
    "motion_blur": _motion_blur,
    "saturate": _saturate,
    "snow": _snow,
    "speckle_noise": _speckle_noise,
}
_OF_IMAGES: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "jpeg_compression": _jpeg_compression,
    "pixelate": _pixelate,
}
COMPUTED = tuple(sorted((*_OF_ARRAYS, *_OF_IMAGES)))
"""The corruptions that need no file."""
_AT_ONCE = 1000  # images, for memory


def corrupt(images: Bytes, name: str, severity: int, rng: np.random.Generator) -> Bytes:
    """Corrupts images.

    Args:
        images: Shape (n, side, side, 3); `side` a power of two.
        name: One of `COMPUTED`.
        severity: 1 to 5.
        rng: Source of randomness.

    Returns:
        The same shape.
    """
    if name in _OF_IMAGES:
        change = _OF_IMAGES[name]
        return np.stack([np.asarray(change(Image.fromarray(image), severity)) for image in images])
    parts = np.array_split(images, max(1, len(images) // _AT_ONCE))
    changed = [_OF_ARRAYS[name](part / 255.0, severity, rng) for part in parts]
    return np.concatenate([(np.clip(part, 0, 1) * 255).astype(np.uint8) for part in changed])
