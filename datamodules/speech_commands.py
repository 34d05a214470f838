"""Speech Commands: one-second recordings of words by speaker.

Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition" (2018), version 0.02.
"""

import hashlib
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedl2p.datamodules.base.domains import Samples
from fedl2p.datamodules.base.partition import IntArray
from fedl2p.datamodules.base.people import People, PeopleDataModule
from fedl2p.datamodules.base.split import MIN_PERSON_SAMPLES, Split
from fedl2p.datamodules.io.files import data_folder, download, missing_data, with_bar
from fedl2p.datamodules.io.mfcc import CLIP_SECONDS, Clip, cached_mfcc, wave_seconds
from fedl2p.errors import DataError

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
CLASSES = (*WORDS, "_silence_", "_unknown_")
_SILENCE, _UNKNOWN = len(WORDS), len(WORDS) + 1
_NOISE = "_background_noise_"
_SUFFIXES = (".wav", ".flac")
_LISTS = ("validation_list.txt", "testing_list.txt")

URL = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"
_GET = (
    f"Set data.init_args.download to true, which fetches {URL} (2.4 GB); or unpack it there, so that there are folders "
    "<word> with <speaker>_nohash_<number>.wav (or .flac)."
)


@dataclass(frozen=True)
class _Archive:
    """What lies in the folder: clips of words by speaker, silence, and which speakers are held out."""

    clips: dict[str, list[tuple[Path, int]]]
    silence: list[Clip]
    held_out: frozenset[str]


class SpeechCommandsDataModule(PeopleDataModule):
    """MFCCs of shape (1, 40, 51), 12 classes, one client a speaker.

    Ten words, silence, and all other words as one class. The seen clients are the training speakers with the most
    clips, the unseen ones are drawn from the speakers of the published validation and test lists; where there are no
    lists, as in the published test archive, both come from all speakers. The paper has 250 and 50 (section 4.1).
    Clips of other words are thinned out, and clips of silence are dealt out, so that of each a client has
    `unknown_fraction` and `silence_fraction` of its number of clips of the ten words; where there is too little
    silence, all have proportionally less. Of clips with the same bytes one is kept.

    MFCCs are 40 coefficients at 8 kHz, of windows of 40 ms every 20 ms, and are computed once and kept in `cache`.

    Args:
        root: The folder with the words; None is ``speech_commands_v2`` among the data sets.
        download: Fetch and unpack the archive where nothing is there.
        cache: Where MFCCs are kept; None is `root`, or where that cannot be written, the user's cache folder.
        unknown_fraction: Clips of other words for each clip of the ten words, from 0.
        silence_fraction: Clips of silence for each clip of the ten words, from 0.
        **options: `batch_size`, and the words of `Split` in `split_keys`; `min_samples` counts clips of all words.

    Raises:
        DataError: If an argument is not as above. `prepare_data` and `setup` raise it when files are missing or broken.
    """

    num_classes = len(CLASSES)
    classes = CLASSES
    # Mean and deviation over the published test archive, so that inputs are of the order of 1.
    mean = (-10.4,)
    std = (53.8,)
    split = Split(seen_clients=250, unseen_clients=50, largest_first=True)

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        download: bool = False,
        cache: str | os.PathLike[str] | None = None,
        unknown_fraction: float = 0.1,
        silence_fraction: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, fraction in (("unknown_fraction", unknown_fraction), ("silence_fraction", silence_fraction)):
            if not 0 <= fraction < np.inf:
                raise DataError(f"{name} is {fraction}; it must be a number from 0.")
        self.unknown_fraction = unknown_fraction
        self.silence_fraction = silence_fraction
        self.download = download
        self.root = data_folder(root, "speech_commands_v2")
        self.cache = None if cache is None else Path(cache)

    def prepare_data(self) -> None:
        """Looks for the files, and fetches them where that was asked for.

        Raises:
            DataError: If they are not there.
        """
        if any((self.root / word).is_dir() for word in WORDS):
            return
        if not self.download:
            raise missing_data("Speech Commands", looked_for=self.root / WORDS[0], get=_GET)
        archive = self.root / Path(URL).name
        if not archive.exists():
            download(URL, archive, sha256=SHA256)
        try:
            with tarfile.open(archive) as opened:
                opened.extractall(self.root, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{archive} cannot be unpacked: {error}") from error

    def find(self) -> People:
        """The speakers; a sample's key is a clip."""
        self.prepare_data()
        self._archive = archive = _read_archive(self.root)
        samples = {
            speaker: Samples([Clip(path) for path, _ in clips], np.array([label for _, label in clips], dtype=np.int64))
            for speaker, clips in archive.clips.items()
        }
        known = [speaker for speaker in samples if speaker not in archive.held_out]
        return People(samples, known, sorted(archive.held_out & set(samples)) or known)

    def complete(self, chosen: dict[str, Samples]) -> dict[str, Samples]:
        """Drops repeated clips, thins out other words, and deals silence."""
        rng = self.rng(2)
        found: set[bytes] = set()
        spoken: dict[str, Samples] = {}
        words = []
        for speaker, samples in with_bar(list(chosen.items()), "Comparing clips"):
            own = samples.take(_first_of_equal_bytes(samples, found))
            of_words = np.flatnonzero(own.labels < _SILENCE)
            others = rng.permutation(np.flatnonzero(own.labels == _UNKNOWN))
            kept = others[: round(self.unknown_fraction * len(of_words))]
            spoken[speaker] = own.take(np.sort(np.concatenate([of_words, kept])))
            words.append(len(of_words))
        result = {}
        for (speaker, own), quiet in zip(spoken.items(), self._deal_silence(words, rng), strict=True):
            labels = np.concatenate([own.labels, np.full(len(quiet), _SILENCE)])
            result[speaker] = Samples([*own.keys, *quiet], labels)
            if len(labels) < MIN_PERSON_SAMPLES:
                raise DataError(
                    f"Speaker {speaker!r} has {len(labels)} clips without repeats and most other words, fewer than one "
                    "a role; raise min_samples."
                )
        return result

    def _deal_silence(self, words: Sequence[int], rng: np.random.Generator) -> list[list[Clip]]:
        """Clips of silence for speakers with some numbers of words; in proportion also where there are too few."""
        silence = self._archive.silence
        wanted = np.rint(self.silence_fraction * np.array(words))
        share = min(1.0, len(silence) / max(1.0, wanted.sum()))
        ends = np.rint(share * np.cumsum(wanted)).astype(int)
        order = rng.permutation(len(silence))
        return [[silence[i] for i in part] for part in np.split(order, ends)[:-1]]

    def read(self, keys: Sequence[Clip]) -> Tensor:
        """Shape (n, 1, 40, 51), float32."""
        return cached_mfcc(keys, self.root if self.cache is None else self.cache)


def _read_archive(root: Path) -> _Archive:
    """Finds all clips of a folder in the published layout; files are not opened, but for background noise."""
    clips: dict[str, list[tuple[Path, int]]] = {}
    silence: list[Clip] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES and path.is_file()]
        if folder.name == _NOISE:
            silence += [Clip(path, float(at)) for path in files for at in range(int(wave_seconds(path) / CLIP_SECONDS))]
        elif folder.name == CLASSES[_SILENCE]:
            silence += [Clip(path) for path in files]
        elif not folder.name.startswith("."):
            label = WORDS.index(folder.name) if folder.name in WORDS else _UNKNOWN
            for path in files:
                speaker, mark, _ = path.stem.partition("_nohash_")
                if mark:
                    clips.setdefault(speaker, []).append((path, label))
    held_out = set()
    for name in _LISTS:
        if (root / name).is_file():
            lines = (root / name).read_text(encoding="utf-8", errors="replace").split()
            held_out |= {Path(line).name.partition("_nohash_")[0] for line in lines}
    return _Archive(clips, silence, frozenset(held_out))


def _first_of_equal_bytes(samples: Samples, found: set[bytes]) -> IntArray:
    """Rows of the clips whose bytes have not been found before, which then are."""
    rows = []
    for row, clip in enumerate(samples.keys):
        digest = hashlib.sha256(clip.path.read_bytes()).digest()
        if digest not in found:
            found.add(digest)
            rows.append(row)
    return np.array(rows, dtype=np.int64)
