"""Folders of runs: whole, interrupted, and damaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedl2p.errors import RunFolderError
from fedl2p.federation.state import RoundRecord
from fedl2p.report.page import write_report
from fedl2p.report.saved_run import read_run

CLIENTS = {
    "classes": ["no", "yes"],
    "clients": [
        {
            "name": "seen-00",
            "pool": "seen",
            "domain": "a",
            "sizes": {"train": 3, "val": 1, "test": 1},
            "labels": {"train": [1, 2], "val": [1, 0], "test": [0, 1]},
            "details": {"severity": 0.5},
        },
        {"name": "seen-01", "pool": "seen", "domain": "b", "sizes": {"train": 4, "val": 2, "test": 2}, "details": {}},
    ],
}


@pytest.fixture
def folder(tmp_path: Path, history: list[RoundRecord]) -> Path:
    """What a run has written before its end."""
    (tmp_path / "config.yaml").write_text("seed: 7\ndata:\n  class_path: my.Data\n")
    lines = [json.dumps(record.as_dict()) for record in history]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "clients.json").write_text(json.dumps(CLIENTS))
    (tmp_path / "checkpoints").mkdir()
    tuning = {"ft_bn_c": {"rate": 0.1, "val_loss": 0.5, "grid": [[0.1, 0.5], [0.2, None]]}}
    (tmp_path / "checkpoints" / "tuning.json").write_text(json.dumps(tuning))
    return tmp_path


def test_an_interrupted_run_is_read_as_far_as_it_came(folder: Path) -> None:
    run = read_run(folder)
    assert not run.finished
    assert run.name == folder.name
    assert run.results["seed"] == 7
    assert len(run.history) == 61
    best = min(run.history, key=lambda record: record["val_loss"])
    assert run.rounds["best"] == best["round"] and run.rounds["last"] == 60 and run.rounds["failures"] == 1
    assert run.who == {"seen-00": ("seen", "a"), "seen-01": ("seen", "b")}
    assert np.array_equal(run.clients[0].counts, [[1, 2], [1, 0], [0, 1]])
    assert run.clients[1].sizes == (4, 2, 2)


def test_an_interrupted_run_has_a_page(folder: Path) -> None:
    text = write_report([folder]).read_text(encoding="utf-8")
    assert "This run has not come to its end" in text
    for title in ("Training", "Clients that failed", "Who has what", "Learning rates", "Configuration"):
        assert f"<h2>{title}</h2>" in text
    assert "<b>0.1: 0.500</b>, 0.2: diverges" in text
    names = sorted(path.name for path in (folder / "figures").iterdir())
    assert names == ["learning-curve.pdf", "learning-curve.svg", "split.pdf", "split.svg"]


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    assert "seed: 7" in write_report([tmp_path]).read_text()


def test_the_last_line_of_a_killed_run_may_be_a_part(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 61, "val')
    assert len(read_run(folder).history) == 61


def test_a_finished_run_has_its_results(folder: Path, results: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(results | {"comparisons": []}))
    run = read_run(folder)
    assert run.finished
    assert run.rounds == results["rounds"]
    assert run.who["unseen-03"] == ("unseen", "all")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("results.json", "{", "damaged"),
        ("results.json", "[1]", "no results"),
        ("metrics.jsonl", "{\n{}\n", "Line 1"),
        ("clients.json", "[]", "does not describe clients"),
        ("clients.json", '{"classes": ["a"], "clients": [{"name": "x"}]}', "does not describe clients"),
        ("hyperparameters.csv", "a,b\n", "columns"),
        ("config.yaml", "a: [", "cannot be read"),
        ("config.yaml", "- 1\n", "no configuration"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(folder: Path, name: str, content: str, words: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(RunFolderError, match=words) as caught:
        read_run(folder)
    assert name in str(caught.value)


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        write_report([tmp_path])
    assert list(tmp_path.iterdir()) == []
