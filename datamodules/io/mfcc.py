"""Mel-frequency cepstral coefficients of one-second clips, computed once and kept on disk."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedl2p.datamodules.io.files import with_bar
from fedl2p.errors import DataError, RunFolderError
from fedl2p.io import write_atomically

CLIP_SECONDS = 1.0
COEFFICIENTS = 40
RATE = 8000  # samples a second
WINDOW = 320  # samples: 40 ms
HOP = 160  # samples: 20 ms
FRAMES = int(RATE * CLIP_SECONDS) // HOP + 1
MELS = 64
_VERSION = 1  # of what is kept; to be raised whenever the numbers change
_AT_ONCE = 256


class Clip(NamedTuple):
    """One second of a sound file, from `start` (in seconds) on."""

    path: Path
    start: float = 0.0


def wave_seconds(path: Path) -> float:
    """How long a sound file is.

    Raises:
        DataError: If it cannot be read.
    """
    soundfile = _libraries()[1]
    try:
        return float(soundfile.info(path).duration)
    except (OSError, RuntimeError) as error:  # soundfile's own errors are RuntimeErrors
        raise DataError(f"The sound file {path} cannot be read: {error}") from error


def cached_mfcc(clips: Sequence[Clip], cache: Path) -> Tensor:
    """MFCCs of clips; short ones are filled up with silence.

    Args:
        clips: Which.
        cache: Folder that keeps the result for the same clips (by name, size and time of change); where it cannot be
            written, the user's cache folder does. What is damaged there is computed anew.

    Returns:
        Shape (clips, 1, 40, 51), float32.

    Raises:
        DataError: If a file cannot be read or has values that are not finite, or librosa is not installed.
    """
    name = f"mfcc-{_fingerprint(clips)}.npy"
    places = [cache / ".fedl2p-cache" / name, _user_cache() / name]
    for place in places:
        kept = _read_kept(place, len(clips))
        if kept is not None:
            return torch.from_numpy(kept)
    computed = _mfcc(clips)
    for place in places:
        if _kept(place, computed):
            break
    return torch.from_numpy(computed)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedl2p"


def _fingerprint(clips: Sequence[Clip]) -> str:
    digest = hashlib.sha256(repr((_VERSION, COEFFICIENTS, RATE, WINDOW, HOP, MELS)).encode())
    for clip in clips:
        status = clip.path.stat()
        digest.update(f"{clip.path.resolve()}|{clip.start}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _read_kept(place: Path, count: int) -> np.ndarray | None:
    """The array of a file; None where there is none, or a damaged one."""
    try:
        with place.open("rb") as file:
            array: np.ndarray = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, ArithmeticError, MemoryError):
        return None
    whole = array.shape == (count, 1, COEFFICIENTS, FRAMES) and array.dtype == np.float32
    return array if whole and np.isfinite(array).all() else None


def _kept(place: Path, array: np.ndarray) -> bool:
    """Writes the array whole or not at all; False where that is not possible."""
    content = io.BytesIO()
    np.save(content, array)
    try:
        write_atomically(place, content.getvalue())
    except RunFolderError:
        return False
    return True


def _mfcc(clips: Sequence[Clip]) -> np.ndarray:
    librosa, _ = _libraries()
    result = np.empty((len(clips), 1, COEFFICIENTS, FRAMES), dtype=np.float32)
    for start in with_bar(range(0, len(clips), _AT_ONCE), "Computing MFCCs"):
        waves = np.stack([_wave(clip) for clip in clips[start : start + _AT_ONCE]])
        options = {"sr": RATE, "n_mfcc": COEFFICIENTS, "n_fft": WINDOW, "hop_length": HOP, "n_mels": MELS}
        result[start : start + _AT_ONCE, 0] = librosa.feature.mfcc(y=waves, **options)
    return result


def _wave(clip: Clip) -> np.ndarray:
    """One second at 8 kHz, shape (8000,), float32."""
    librosa, soundfile = _libraries()
    try:
        with soundfile.SoundFile(clip.path) as file:
            file.seek(min(int(clip.start * file.samplerate), file.frames))
            wave = file.read(int(CLIP_SECONDS * file.samplerate), dtype="float32", always_2d=True).mean(axis=1)
            rate = file.samplerate
    except (OSError, RuntimeError) as error:
        raise DataError(f"The sound file {clip.path} cannot be read: {error}") from error
    if not np.isfinite(wave).all():
        raise DataError(f"The sound file {clip.path} has values that are NaN or infinite.")
    wave = librosa.resample(wave, orig_sr=rate, target_sr=RATE) if rate != RATE else wave
    length = int(RATE * CLIP_SECONDS)
    return np.pad(wave[:length], (0, max(0, length - len(wave))))


def _libraries() -> tuple[Any, Any]:
    try:
        import librosa
        import soundfile
    except ImportError as error:
        raise DataError(
            f"Sound is read by librosa and soundfile, and {error.name} is not installed; install them by pip install "
            "'fedl2p[speech]'."
        ) from error
    return librosa, soundfile
