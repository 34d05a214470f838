"""MFCCs against numbers that are computed another way."""

from pathlib import Path

import librosa
import numpy as np
import pytest
import scipy.fft
import soundfile

from fedl2p.datamodules.io.mfcc import Clip, cached_mfcc, wave_seconds
from fedl2p.errors import DataError


def write(path: Path, wave: np.ndarray, rate: int = 8000) -> Clip:
    soundfile.write(path, wave, rate, subtype="FLOAT")
    return Clip(path)


def test_silence_is_the_floor_of_100_decibels_in_every_band(tmp_path: Path) -> None:
    """64 equal bands of -100 dB: an orthonormal DCT leaves -100 * sqrt(64) in the first coefficient alone."""
    coefficients = cached_mfcc([write(tmp_path / "a.wav", np.zeros(8000))], tmp_path)[0, 0].numpy()
    assert coefficients.shape == (40, 51)
    np.testing.assert_allclose(coefficients[0], -800.0, rtol=1e-6)
    np.testing.assert_allclose(coefficients[1:], 0.0, atol=1e-3)


def test_the_definition_step_by_step(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).normal(scale=0.1, size=8000).astype(np.float32)
    found = cached_mfcc([write(tmp_path / "a.wav", wave)], tmp_path)[0, 0].numpy()
    padded = np.pad(wave.astype(np.float64), 160)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(320) / 320)
    frames = np.stack([padded[160 * i : 160 * i + 320] * window for i in range(51)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    bands = power @ librosa.filters.mel(sr=8000, n_fft=320, n_mels=64).astype(np.float64).T
    decibels = 10 * np.log10(np.maximum(bands, 1e-10))
    expected = scipy.fft.dct(np.maximum(decibels, decibels.max() - 80), norm="ortho")[:, :40].T
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)


def test_clips_are_resampled_mixed_cut_and_filled_up_to_a_second(tmp_path: Path) -> None:
    times = np.arange(16000) / 16000
    tone = 0.5 * np.sin(2 * np.pi * 440 * times).astype(np.float32)
    one = cached_mfcc([write(tmp_path / "a.wav", tone, 16000)], tmp_path)
    stereo = cached_mfcc([write(tmp_path / "b.wav", np.stack([tone, tone], axis=1), 16000)], tmp_path)
    longer = cached_mfcc([write(tmp_path / "c.wav", np.concatenate([tone, tone]), 16000)], tmp_path)
    np.testing.assert_array_equal(one, stereo)
    np.testing.assert_allclose(one, longer, atol=0.5)
    short = cached_mfcc([write(tmp_path / "d.wav", tone[:8000], 16000)], tmp_path)
    assert float(short[0, 0, 0, -1]) < float(short[0, 0, 0, 0]) - 100


def test_a_clip_can_start_inside_a_file(tmp_path: Path) -> None:
    wave = np.random.default_rng(1).normal(scale=0.1, size=24000).astype(np.float32)
    path = write(tmp_path / "a.wav", wave).path
    inside = cached_mfcc([Clip(path, 1.0)], tmp_path)
    np.testing.assert_array_equal(inside, cached_mfcc([write(tmp_path / "b.wav", wave[8000:16000])], tmp_path))
    assert wave_seconds(path) == 3.0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.wav"):
        wave_seconds(tmp_path / "nowhere.wav")


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "blocked").write_text("a file where the folder would be")
    clip = write(tmp_path / "a.wav", np.zeros(8000))
    cached_mfcc([clip], tmp_path / "blocked")
    assert len(list((tmp_path / "user" / "fedl2p" / "").rglob("*.npy"))) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sound_that_is_no_sound_is_named(tmp_path: Path, value: float) -> None:
    wave = np.zeros(8000, dtype=np.float32)
    wave[7000] = value
    with pytest.raises(DataError, match=r"a\.wav has values that are NaN or infinite"):
        cached_mfcc([write(tmp_path / "a.wav", wave)], tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "shape", "nan"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    clip = write(tmp_path / "a.wav", np.random.default_rng(0).normal(scale=0.1, size=8000))
    first = cached_mfcc([clip], tmp_path).clone()
    (kept,) = (tmp_path / ".fedl2p-cache").glob("*.npy")
    if damage in ("shape", "nan"):
        np.save(kept, first.numpy()[:, :, 1:] if damage == "shape" else np.full_like(first.numpy(), np.nan))
    else:
        kept.write_bytes({"empty": b"", "cut": kept.read_bytes()[:-5], "text": b"no array"}[damage])
    np.testing.assert_array_equal(cached_mfcc([clip], tmp_path), first)
    np.testing.assert_array_equal(np.load(kept), first)
