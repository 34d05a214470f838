"""Reading image files: every kind becomes the same bytes, and a broken one is named."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedl2p.datamodules.io import images
from fedl2p.datamodules.io.images import flip_and_rotate, image_files, read_images
from fedl2p.errors import DataError


def save(path: Path, pixels: Any, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(np.asarray(pixels))
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def halves(height: int = 6, width: int = 12) -> np.ndarray:
    """Red on the left, blue on the right: (height, width, 3)."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = 200
    pixels[:, width // 2 :, 2] = 200
    return pixels


def test_a_square_image_is_read_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    read = read_images([save(tmp_path / "a.png", pixels)], 8)
    assert read.dtype == torch.uint8 and read.is_contiguous()
    assert np.array_equal(read[0].permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tif", "webp", "ppm"])
def test_formats_agree(tmp_path: Path, suffix: str) -> None:
    read = read_images([save(tmp_path / f"a.{suffix}", np.full((20, 20, 3), (200, 100, 50), dtype=np.uint8))], 4)
    assert (read[0].float() - torch.tensor([200.0, 100.0, 50.0])[:, None, None]).abs().max() < 6


def test_a_crop_keeps_the_middle_and_a_stretch_everything(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 255
    path = save(tmp_path / "wide.png", wide)
    assert read_images([path], 8, fit="crop").min() == 255
    stretched = read_images([path], 24, fit="stretch")[0, 0].float()
    assert stretched[:, :6].max() == 0 and stretched[:, 10:14].min() == 255 and stretched[:, 18:].max() == 0
    tall = save(tmp_path / "tall.png", wide.transpose(1, 0, 2))
    assert read_images([tall], 8, fit="crop").min() == 255


def test_a_large_jpeg_keeps_its_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "large.jpg", halves(600, 1200), quality=95)
    read = read_images([path], 16, fit="stretch").float()
    assert (read[0, 0, :, :7] - 200).abs().max() < 8 and read[0, 0, :, 9:].max() < 8
    assert (read[0, 2, :, 9:] - 200).abs().max() < 8


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:, :2, 3] = 255  # black on the left, nothing on the right
    for path in (save(tmp_path / "rgba.png", pixels), save(tmp_path / "la.png", pixels, "LA")):
        read = read_images([path], 4)
        assert read[..., :2].max() == 0 and read[..., 2:].min() == 255


def test_a_transparent_colour_of_a_palette_becomes_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "palette.png", transparency=0)
    read = read_images([tmp_path / "palette.png"], 2)[0]
    assert read[:, 0, 0].tolist() == [255, 255, 255] and read[:, 0, 1].tolist() == [255, 0, 0]


def test_grey_becomes_three_channels_or_stays_one(tmp_path: Path) -> None:
    path = save(tmp_path / "grey.png", np.full((4, 4), 70, dtype=np.uint8))
    assert read_images([path], 4).tolist() == torch.full((1, 3, 4, 4), 70).tolist()
    assert read_images([path], 4, grayscale=True).tolist() == torch.full((1, 1, 4, 4), 70).tolist()
    colours = read_images([save(tmp_path / "red.png", halves())], 6, grayscale=True)
    assert colours.shape == (1, 1, 6, 6) and 0 < colours.max() < 100


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    path = save(tmp_path / "deep.png", np.full((4, 4), 32896, dtype=np.uint16))
    assert read_images([path], 4).unique().tolist() == [128]


def test_the_orientation_of_a_camera_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by a quarter: what the file has on the left belongs on top
    save(tmp_path / "turned.jpg", halves(32, 32), exif=exif, quality=95)
    read = read_images([tmp_path / "turned.jpg"], 32)[0].float()
    assert read[0, :14].mean() > 180 and read[0, 18:].mean() < 20


def test_order_is_kept_whatever_the_threads(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", np.full((3, 3), i, dtype=np.uint8)) for i in range(40)]
    for threads in (1, 4):
        assert read_images(paths, 3, threads=threads)[:, 0, 0, 0].tolist() == list(range(40))
    assert read_images([], 3).shape == (0, 3, 3, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif"])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = save(tmp_path / f"whole.{suffix}", noise)
    broken = tmp_path / f"broken.{suffix}"
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"The image .*broken\.{suffix} cannot be read: \S"):
        read_images([whole, broken, whole], 8)


def test_what_is_no_image_or_not_there_is_named(tmp_path: Path) -> None:
    for content in (b"", b"<html>not found</html>"):
        (tmp_path / "page.jpg").write_bytes(content)
        with pytest.raises(DataError, match=r"page\.jpg cannot be read: cannot identify"):
            read_images([tmp_path / "page.jpg"], 8)
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read: there is no such file"):
        read_images([tmp_path / "gone.jpg"], 8)


def test_an_image_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "bomb.png", np.zeros((100, 100), dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"bomb\.png cannot be read: .*decompression bomb"):
        read_images([path], 8)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 8, "fit": "squeeze"}])
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="at least 1 and fit 'crop' or 'stretch'"):
        read_images([], **wrong)


def test_a_bar_appears_on_standard_error_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [save(tmp_path / f"{i}.png", np.full((3, 3), i, dtype=np.uint8)) for i in range(6)]
    read_images(paths, 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(images, "_PATIENCE", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    read_images(paths, 3)
    out, err = capsys.readouterr()
    assert out == "" and "Reading images" in err


def test_an_error_stops_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def slow(path: Path, *_: Any) -> torch.Tensor:
        asked.append(path)
        if path.name == "0":
            raise DataError("broken")
        time.sleep(0.01)
        return torch.zeros(3, 2, 2)

    monkeypatch.setattr(images, "_read", slow)
    with pytest.raises(DataError, match="broken"):
        read_images([tmp_path / str(i) for i in range(500)], 2)
    assert len(asked) < 50


def test_files_are_found_by_suffix_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.jpeg", "c.png", ".d.jpg", "._c.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in image_files(tmp_path)] == ["a.jpeg", "b.JPG", "c.png"]


def test_augmentation_mirrors_half_and_turns_by_at_most_thirty_degrees() -> None:
    point = torch.zeros(400, 1, 33, 65)
    point[..., 16, 44] = 1  # 12 pixels to the right of the middle
    turned = flip_and_rotate(point, torch.Generator().manual_seed(0))[:, 0]
    ys, xs = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(65.0) - 32, indexing="ij")
    total = turned.sum(dim=(1, 2))
    y, x = (turned * ys).sum(dim=(1, 2)) / total, (turned * xs).sum(dim=(1, 2)) / total
    assert (torch.hypot(y, x) - 12).abs().max() < 0.5
    assert 0.4 < (x < 0).float().mean() < 0.6
    angles = torch.atan2(y, x.abs()).rad2deg()
    assert angles.abs().max() < 31 and angles.min() < -25 and angles.max() > 25
    assert angles.std().item() == pytest.approx(30 / math.sqrt(3), rel=0.1)


def test_augmentation_follows_its_generator_and_keeps_an_unturned_image() -> None:
    batch = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first, again, other = (flip_and_rotate(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == batch.shape
    assert torch.equal(torch.get_rng_state(), state)
    still = flip_and_rotate(batch, torch.Generator().manual_seed(0), degrees=0.0)
    for image, before in zip(still, batch, strict=True):
        assert min((image - before).abs().max(), (image - before.flip(-1)).abs().max()) < 1e-5


@pytest.mark.parametrize(("name", "dtype"), [("a.tif", np.float32), ("a.tif", np.int32), ("a.ppm", np.float32)])
def test_thirty_two_bits_a_channel_do_not_turn_black(tmp_path: Path, name: str, dtype: Any) -> None:
    Image.fromarray(np.full((4, 4), 200, dtype=dtype)).save(tmp_path / name)
    with pytest.raises(DataError, match="32 bits a channel"):
        read_images([tmp_path / name], 4)


def test_only_the_named_formats_are_opened(tmp_path: Path) -> None:
    for format in ("EPS", "JPEG2000", "TGA"):
        Image.fromarray(halves()).save(tmp_path / "other.png", format)
        with pytest.raises(DataError, match=r"other\.png cannot be read: cannot identify"):
            read_images([tmp_path / "other.png"], 4)


def test_more_pixels_than_allowed_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "wide.png", np.zeros((20, 50), dtype=np.uint8))
    monkeypatch.setattr(images, "MAX_PIXELS", 999)
    with pytest.raises(DataError, match=r"wide\.png cannot be read: it has 50 x 20 pixels; allowed are 999"):
        read_images([path], 8)
