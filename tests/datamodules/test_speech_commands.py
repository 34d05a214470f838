"""Speech Commands in the published layout, and the real test archive."""

import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_round import run_one_round
from tiny_data import speech_commands as tiny

from fedl2p.datamodules import SpeechCommandsDataModule, speech_commands
from fedl2p.datamodules.base.arrays import labels_of
from fedl2p.datamodules.io import mfcc
from fedl2p.datamodules.speech_commands import CLASSES
from fedl2p.errors import DataError

SILENCE, UNKNOWN = CLASSES.index("_silence_"), CLASSES.index("_unknown_")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    tiny.write(tmp_path / "speech")
    return tmp_path / "speech"


def module(root: Path, **options: Any) -> SpeechCommandsDataModule:
    settings: dict[str, Any] = {
        "seen_clients": 3,
        "unseen_clients": 2,
        "min_samples": 6,
        "unknown_fraction": 0.5,
        "silence_fraction": 0.25,
    }
    return SpeechCommandsDataModule(root, **(settings | options))


def labels(client: Any) -> np.ndarray:
    together = np.concatenate([labels_of(role) for role in (client.train, client.val, client.test)])
    return np.bincount(together, minlength=len(CLASSES))


def test_seen_clients_are_training_speakers_and_unseen_ones_are_not(archive: Path) -> None:
    data = module(archive)
    names = {pool: {data.clients[i].name.partition("-")[2] for i in data.pool(pool)} for pool in ("seen", "unseen")}
    assert names["seen"] <= set(tiny.TRAINING) and tiny.TRAINING[0] in names["seen"]  # who has the most clips
    assert names["unseen"] <= {*tiny.VALIDATION, *tiny.TESTING}
    assert data.input_shape == (1, 40, 51) and data.num_classes == 12


def test_other_words_and_silence_come_in_proportion_to_a_client_s_words(archive: Path) -> None:
    data = module(archive)
    for client in data.clients:
        counts = labels(client)
        words = 10 if client.name.endswith(tiny.TRAINING[0]) else 8
        assert counts[:10].tolist() == [words // 2, words // 2, 0, 0, 0, 0, 0, 0, 0, 0]
        assert counts[UNKNOWN] == words // 2
    # The noise of 8.5 seconds gives 8 clips, fewer than a quarter of all words, 10: all have a fifth less.
    assert [int(labels(client)[SILENCE]) for client in data.clients] == [2, 1, 2, 1, 2]
    few = module(archive, silence_fraction=0.125)
    assert [int(labels(client)[SILENCE]) for client in few.clients] == [1, 1, 1, 1, 1]


def test_no_second_of_silence_is_dealt_twice_and_the_seed_deals_it(archive: Path) -> None:
    def silence(seed: int) -> list[bytes]:
        data = module(archive, seed=seed)
        roles = [role for client in data.clients for role in (client.train, client.val, client.test)]
        return [x.numpy().tobytes() for role in roles for x, y in role if y == SILENCE]

    assert len(set(silence(0))) == 8
    assert silence(0) == silence(0)
    assert silence(0) != silence(1)


def test_clips_of_equal_bytes_are_kept_once(archive: Path) -> None:
    before = labels(module(archive).clients[0])
    folder, speaker = archive / "yes", module(archive).clients[0].name.partition("-")[2]
    shutil.copy(folder / f"{speaker}_nohash_0.wav", folder / f"{speaker}_nohash_8.wav")
    assert labels(module(archive).clients[0]).tolist() == before.tolist()


def test_flac_and_a_folder_of_silence_without_lists_are_read_as_well(tmp_path: Path) -> None:
    tiny.write(tmp_path, suffix=".flac")
    shutil.rmtree(tmp_path / "_background_noise_")
    for name in ("validation_list.txt", "testing_list.txt"):
        (tmp_path / name).unlink()
    for number in range(20):
        tiny.write_clip(tmp_path / "_silence_" / f"{number:02d}.flac", seed=900 + number)
    data = module(tmp_path, seen_clients=4, unseen_clients=3)
    assert {client.name.partition("-")[2] for client in data.clients} == {
        *tiny.TRAINING,
        *tiny.VALIDATION,
        *tiny.TESTING,
    }
    assert [int(labels(client)[SILENCE]) for client in data.clients] == [2] * 7


def test_mfccs_are_computed_once_and_anew_when_a_file_has_changed(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compute = mfcc._mfcc
    monkeypatch.setattr(mfcc, "_mfcc", lambda clips: calls.append(len(clips)) or compute(clips))
    first = module(archive).clients[0].train[0][0]
    second = module(archive).clients[0].train[0][0]
    assert torch.equal(first, second)
    assert len(calls) == 1
    tiny.write_clip(archive / "yes" / f"{tiny.TRAINING[0]}_nohash_0.wav", seed=77)
    module(archive).setup()
    assert len(calls) == 2


def test_the_cache_can_lie_elsewhere(archive: Path, tmp_path: Path) -> None:
    module(archive, cache=tmp_path / "cache").setup()
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    assert not list(archive.rglob("*.npy"))


def test_missing_files_say_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Speech Commands is not there: .*download to true.*2\.4 GB.*FEDL2P_DATA"):
        module(tmp_path / "nowhere").prepare_data()


def test_an_archive_that_is_there_is_unpacked_without_the_network(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("nothing has to be fetched")

    monkeypatch.setattr(speech_commands, "download", refuse)
    root = tmp_path / "unpacked"
    root.mkdir()
    with tarfile.open(root / "speech_commands_v0.02.tar.gz", "w:gz") as packed:
        for path in sorted(archive.iterdir()):
            packed.add(path, f"./{path.name}")
    data = module(root, download=True)
    data.prepare_data()
    assert len(data.clients) == 5


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "speech_commands_v0.02.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"speech_commands_v0\.02\.tar\.gz cannot be unpacked"):
        module(tmp_path, download=True).prepare_data()


@pytest.mark.parametrize("name", ["yes", "_background_noise_"])
def test_a_broken_clip_is_named(archive: Path, name: str) -> None:
    for path in (archive / name).glob("*.wav"):
        path.write_bytes(b"RIFF and nothing else " + path.name.encode())
    with pytest.raises(DataError, match=rf"{name}.*\.wav cannot be read"):
        module(archive).setup()


def test_folders_that_are_called_like_clips_do_not_count(archive: Path) -> None:
    before = [client.name for client in module(archive).clients]
    (archive / "yes" / "00aa0001_nohash_9.wav").mkdir()
    (archive / "_background_noise_" / "noise.wav").mkdir()
    assert [client.name for client in module(archive).clients] == before


def test_a_speaker_of_too_few_own_clips_is_an_error(archive: Path) -> None:
    first = tiny.TRAINING[0]
    for word in ("yes", "no"):
        for path in (archive / word).glob(f"{first}*"):
            path.unlink()
    with pytest.raises(DataError, match=f"'{first}' has 0 clips"):
        module(archive, seen_clients=4).setup()


@pytest.mark.parametrize("name", ["unknown_fraction", "silence_fraction"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_impossible_fractions_are_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(DataError, match=name):
        SpeechCommandsDataModule(tmp_path, **{name: value})  # type: ignore[arg-type]


def test_one_can_train_on_it(archive: Path, tmp_path: Path) -> None:
    options = {"root": str(archive), "seen_clients": 3, "unseen_clients": 1}
    methods = run_one_round("fedl2p.datamodules.SpeechCommandsDataModule", options, tmp_path / "run", num_classes=12)
    assert len(methods["fedl2p"]["seen"]["clients"]) == 3


def test_one_can_train_on_the_real_test_archive(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    options = {
        "root": str(shared_data("speech_commands_v2")),
        "cache": str(tmp_path / "cache"),
        "seen_clients": 20,
        "unseen_clients": 5,
    }
    data = SpeechCommandsDataModule(**options)  # type: ignore[arg-type]
    data.setup()
    started = time.perf_counter()
    SpeechCommandsDataModule(**options).setup()  # type: ignore[arg-type]
    assert time.perf_counter() - started < 5
    inputs = torch.stack([x for client in data.clients for x, _ in client.train])
    assert abs(float(inputs.mean())) < 0.3 and 0.7 < float(inputs.std()) < 1.3
    methods = run_one_round("fedl2p.datamodules.SpeechCommandsDataModule", options, tmp_path / "run", num_classes=12)
    assert len(methods["fedl2p"]["unseen"]["clients"]) == 5
