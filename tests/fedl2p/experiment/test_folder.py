"""A run's folder is made once and never overwritten."""

import json
import math
from pathlib import Path

import pytest

from fedl2p.errors import RunFolderError
from fedl2p.experiment.folder import RunFolder


def test_a_new_or_empty_folder_is_usable_and_not_touched(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").require_usable(resume=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").require_usable(resume=False)


def test_starting_makes_the_folder_with_its_configuration(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    folder.start("seed: 1\n", resume=False)
    assert (tmp_path / "a" / "b" / "config.yaml").read_text() == "seed: 1\n"
    assert folder.checkpoints.is_dir()


def test_a_used_folder_is_refused_unless_resumed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start("seed: 1\n", resume=False)
    with pytest.raises(RunFolderError, match="already holds a run; choose another folder, or add --resume"):
        folder.require_usable(resume=False)
    folder.require_usable(resume=True)
    folder.start("seed: 1\n", resume=True)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ("seed: 1\nrounds: 3\n", r"'rounds: 2' there, 'rounds: 3' now"),
        ("seed: 1\nrounds: 2\nmore: 1\n", "nothing"),
        ("seed: 1\n", "nothing"),
    ],
)
def test_resuming_with_another_configuration_is_refused_and_changes_nothing(
    tmp_path: Path, now: str, words: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start("seed: 1\nrounds: 2\n", resume=False)
    with pytest.raises(RunFolderError, match=words):
        folder.start(now, resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\nrounds: 2\n"


TWICE = "seed: 1\npretraining:\n  rounds: 2\nfederation:\n  rounds: {}\n  patience: 3\n"


def test_only_the_rounds_of_the_federation_may_grow(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(TWICE.format(2), resume=False)
    for other in (TWICE.format(1), TWICE.format(3).replace("rounds: 2", "rounds: 3"), TWICE.format(3) + "more: 1\n"):
        with pytest.raises(RunFolderError, match=r"Only federation\.rounds may grow"):
            folder.start(other, resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == TWICE.format(2)
    folder.start(TWICE.format(5), resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == TWICE.format(5)


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"a: [", b"- 1"])
def test_a_damaged_configuration_is_one_line(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(damage)
    with pytest.raises(RunFolderError, match="config"):
        RunFolder(tmp_path).require_same("seed: 1\n")


def test_a_folder_that_was_killed_while_it_was_made_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".config.yaml.0123.tmp").write_text("see")
    folder = RunFolder(tmp_path)
    folder.require_usable(resume=False)
    with folder.opened("seed: 1\n", resume=False):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml"]


def test_a_folder_is_open_to_one_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.opened("seed: 1\n", resume=False):
        for resume in (True, False):
            with (
                pytest.raises(RunFolderError, match="Another process is at work"),
                RunFolder(tmp_path / "run").opened("seed: 1\n", resume=resume),
            ):
                pass
    with pytest.raises(ValueError, match="mine"), folder.opened("seed: 1\n", resume=True):
        raise ValueError("mine")
    folder.require_usable(resume=True)
    with pytest.raises(RunFolderError, match="already holds a run"), folder.opened("seed: 2\n", resume=False):
        pass


def test_other_data_are_refused_with_the_first_client(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.require_same_data({"a": "1"})  # a new run has nothing to compare with
    folder.write_json("checkpoints/data.json", {"a": "1", "b": "2", "c": "3"})
    folder.require_same_data({"a": "1", "b": "2", "c": "3"})
    for other, name in (({"a": "1", "b": "9", "c": "8"}, "b"), ({"a": "1", "b": "2"}, "c"), ({"z": "1"}, "z")):
        with pytest.raises(RunFolderError, match=f"first at client '{name}'"):
            folder.require_same_data(other)


def test_a_file_or_nothing_to_resume_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "file").require_usable(resume=False)
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        RunFolder(tmp_path / "new").require_usable(resume=True)


def test_json_has_null_for_what_is_not_finite_and_strings_for_keys(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("x.json", {1: math.nan, "b": [math.inf, (1, 2.5)], "c": {"d": None}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"1": None, "b": [None, [1, 2.5]], "c": {"d": None}}
    assert folder.read_json("x.json") == {"1": None, "b": [None, [1, 2.5]], "c": {"d": None}}
    assert folder.read_json("none.json") is None
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(RunFolderError, match=r"x\.json"):
        RunFolder(tmp_path).read_json("x.json")
