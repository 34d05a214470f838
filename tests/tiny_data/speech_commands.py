"""Speech Commands v0.02 as its publisher ships it.

The archive has `<word>/<speaker>_nohash_<n>.wav` (16 kHz, mono, 16 bits, one second or a little less; a speaker is
eight hexadecimal digits), `_background_noise_/<name>.wav` of about a minute with a `README.md`, `validation_list.txt`
and `testing_list.txt` with lines `<word>/<file>`, `LICENSE` and `README.md` (arxiv.org/abs/1804.03209, section 5.8).
"""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16_000
WORDS = ("yes", "no", "bed", "zero")
TRAINING = ("00aa0001", "00aa0002", "00aa0003", "00aa0004")
VALIDATION = ("00bb0001", "00bb0002")
TESTING = ("00cc0001",)


def write_clip(path: Path, *, seed: int, seconds: float = 1.0) -> None:
    """Noise around a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(int(RATE * seconds)) / RATE
    rng = np.random.default_rng(seed)
    wave = 0.3 * np.sin(2 * np.pi * (200 + 100 * (seed % 7)) * times) + 0.05 * rng.standard_normal(len(times))
    soundfile.write(path, np.clip(wave, -1, 1), RATE, subtype="PCM_16")


def write(root: Path, *, clips: int = 4, suffix: str = ".wav") -> None:
    """Each speaker says each word `clips` times; the first training speaker once more."""
    seed = 0
    for speaker in (*TRAINING, *VALIDATION, *TESTING):
        for word in WORDS:
            for number in range(clips + (speaker == TRAINING[0])):
                seed += 1
                write_clip(root / word / f"{speaker}_nohash_{number}{suffix}", seed=seed)
    write_clip(root / "_background_noise_" / "running_tap.wav", seed=0, seconds=8.5)
    (root / "_background_noise_" / "README.md").write_text("Background noise samples\n")
    (root / "README.md").write_text("Speech Commands Data Set v0.02\n")
    (root / "LICENSE").write_text("Creative Commons BY 4.0\n")
    for name, speakers in (("validation_list.txt", VALIDATION), ("testing_list.txt", TESTING)):
        lines = [f"{word}/{speaker}_nohash_{n}.wav\n" for word in WORDS for speaker in speakers for n in range(clips)]
        (root / name).write_text("".join(lines))


def make(folder: Path) -> dict[str, Any]:
    """The data set, and what a configuration needs for it."""
    write(folder)
    return {
        "data.init_args.root": str(folder),
        "data.init_args.seen_clients": 3,
        "data.init_args.unseen_clients": 2,
        "federation.client_fraction": 0.5,
        "federation.validation_fraction": 1.0,
        "pretraining.client_fraction": 0.5,
    }
