"""Corruptions: nothing at severity 0, more with more severity, always images."""

import pytest
import torch
from torch import Tensor

from fedl2p.datamodules.corruptions.digits import CORRUPTIONS
from fedl2p.datamodules.digits import _load
from fedl2p.errors import DataError

KINDS = ("noise", "blur", "contrast", "brightness", "rotation", "inversion")


def corrupt(kind: str, images: Tensor, severity: float, seed: int = 0) -> Tensor:
    return CORRUPTIONS[kind](images, severity, torch.Generator().manual_seed(seed))


@pytest.fixture
def images() -> Tensor:
    """Handwritten digits on black: shape (50, 1, 8, 8)."""
    return _load()[0][:50]


def test_all_kinds_are_there() -> None:
    assert tuple(CORRUPTIONS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_severity_zero_changes_nothing(kind: str, images: Tensor) -> None:
    assert torch.equal(corrupt(kind, images, 0.0), images)


@pytest.mark.parametrize("kind", KINDS)
def test_change_grows_with_severity_and_stays_in_range(kind: str, images: Tensor) -> None:
    before = images.clone()
    changes = []
    for severity in (0.0, 0.5, 1.0):
        shifted = corrupt(kind, images, severity)
        assert shifted.is_contiguous() and shifted.shape == images.shape and shifted.dtype == images.dtype
        assert shifted.min() >= 0 and shifted.max() <= 1
        changes.append((shifted - images).abs().mean().item())
    assert changes[0] == 0 and changes[0] + 0.02 < changes[1] and changes[1] + 0.02 < changes[2]
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_alone_decides(kind: str, images: Tensor) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(corrupt(kind, images, 0.7), corrupt(kind, images, 0.7))
    assert torch.equal(corrupt(kind, images, 0.7), corrupt(kind, images, 0.7, seed=1)) == (kind != "noise")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_severity_hardly_changes_anything(kind: str, images: Tensor) -> None:
    assert (corrupt(kind, images, 1e-4) - images).abs().max() < 2e-3


def test_noise_has_the_promised_spread() -> None:
    grey = torch.full((500, 1, 8, 8), 0.5)
    assert corrupt("noise", grey, 0.2).std().item() == pytest.approx(0.1, rel=0.03)


def test_blur_keeps_the_light_and_spreads_a_point_alike_on_both_axes() -> None:
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1
    blurred = corrupt("blur", point, 1.0)[0, 0]
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(blurred, blurred.T)
    ratio = blurred[4, 5] / blurred[4, 4]
    assert ratio.item() == pytest.approx(torch.tensor(-0.5 / 1.2**2).exp().item(), rel=1e-4)
    torch.testing.assert_close(corrupt("blur", torch.full((1, 1, 8, 8), 0.3), 1.0), torch.full((1, 1, 8, 8), 0.3))


def test_blur_treats_channels_apart() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.cat([corrupt("blur", images[:, c : c + 1], 0.8) for c in range(3)], dim=1)
    torch.testing.assert_close(corrupt("blur", images, 0.8), one_by_one)


@pytest.mark.parametrize(
    ("kind", "pixels", "expected"),
    [
        ("contrast", [0.0, 0.5, 1.0], [0.425, 0.5, 0.575]),
        ("brightness", [0.0, 0.3, 1.0], [0.6, 0.9, 1.0]),
        ("inversion", [0.0, 0.3, 1.0], [1.0, 0.7, 0.0]),
    ],
)
def test_full_severity_of_pixelwise_kinds(kind: str, pixels: list[float], expected: list[float]) -> None:
    image = torch.tensor(pixels).view(1, 1, 1, 3)
    torch.testing.assert_close(corrupt(kind, image, 1.0).flatten(), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(9, 9), (9, 17), (17, 9)])
def test_rotation_moves_a_point_by_its_angle(shape: tuple[int, int]) -> None:
    height, width = shape
    image = torch.zeros(1, 1, height, width)
    image[..., height // 2, width // 2 + 4] = 1
    turned = corrupt("rotation", image, 0.5)[0, 0]  # 30 degrees
    ys, xs = torch.meshgrid(torch.arange(height) - height // 2, torch.arange(width) - width // 2, indexing="ij")
    y, x = (turned * ys).sum() / turned.sum(), (turned * xs).sum() / turned.sum()
    assert torch.hypot(y, x).item() == pytest.approx(4, abs=0.2)
    assert torch.atan2(y.abs(), x).rad2deg().item() == pytest.approx(30, abs=3)


@pytest.mark.parametrize("severity", [-0.1, 1.1, float("nan")])
def test_severity_must_be_in_range(severity: float, images: Tensor) -> None:
    with pytest.raises(DataError, match="severity of 'blur'"):
        corrupt("blur", images, severity)


@pytest.mark.parametrize("wrong", [torch.zeros(8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)])
def test_images_must_be_float_planes(wrong: Tensor) -> None:
    with pytest.raises(DataError, match="floats of shape"):
        corrupt("noise", wrong, 0.5)
