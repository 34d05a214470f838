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
