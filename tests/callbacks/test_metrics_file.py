"""`metrics.jsonl` holds each round exactly once."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedl2p.callbacks import MetricsFile
from fedl2p.errors import RunFolderError
from fedl2p.federation.state import MetaState, RoundRecord

MakeState = Callable[[int], MetaState]
MakeRecord = Callable[..., RoundRecord]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_round_is_a_line_that_can_be_read_at_once(
    tmp_path: Path, make_state: MakeState, make_record: MakeRecord
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    callback, state = MetricsFile(path=path), make_state(-1)
    callback.on_rounds_start(state, 3)
    assert path.read_text() == ""
    for number in range(4):
        state.add(make_record(number), {})
        callback.on_round_end(state, state.history[-1])
        assert lines(path) == [record.as_dict() for record in state.history]
    callback.on_rounds_end(state)
    assert len(lines(path)) == 4


def test_a_resumed_run_neither_doubles_nor_loses_a_line(
    tmp_path: Path, make_state: MakeState, make_record: MakeRecord
) -> None:
    path = tmp_path / "metrics.jsonl"
    # Rounds 3 and 4 were written after the last checkpoint, and round 1 went missing.
    path.write_text("".join(json.dumps(make_record(n, 9.0).as_dict()) + "\n" for n in (0, 2, 3, 4)) + '{"round": 5, ')
    callback, state = MetricsFile(path=path), make_state(2)
    callback.on_rounds_start(state, 6)
    assert lines(path) == [record.as_dict() for record in state.history]
    state.add(make_record(3), {})
    callback.on_round_end(state, state.history[-1])
    callback.on_rounds_end(state)
    assert [line["round"] for line in lines(path)] == [0, 1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_one_object_serves_two_runs_after_each_other(
    tmp_path: Path, make_state: MakeState, make_record: MakeRecord
) -> None:
    callback = MetricsFile(path=tmp_path / "metrics.jsonl")
    for last in (1, 3):
        state = make_state(last)
        callback.on_rounds_start(state, 9)
        state.add(make_record(last + 1), {})
        callback.on_round_end(state, state.history[-1])
    callback.on_rounds_end(state)
    callback.on_rounds_end(state)
    assert [line["round"] for line in lines(callback.path)] == [0, 1, 2, 3, 4]


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path, make_state: MakeState, make_record: MakeRecord) -> None:
    callback = MetricsFile(path=tmp_path / "metrics.jsonl")
    callback.on_round_end(make_state(0), make_record(1, math.nan))
    callback.on_round_end(make_state(0), make_record(2, math.inf))
    callback.on_rounds_end(make_state(0))
    assert [line["val_loss"] for line in lines(callback.path)] == [None, None]
    assert "NaN" not in callback.path.read_text()


def test_a_path_that_cannot_be_written_is_an_error(
    tmp_path: Path, make_state: MakeState, make_record: MakeRecord
) -> None:
    (tmp_path / "run").write_text("in the way")
    callback = MetricsFile(path=tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(RunFolderError, match="Cannot write"):
        callback.on_rounds_start(make_state(-1), 1)
    with pytest.raises(RunFolderError, match="Cannot write"):
        callback.on_round_end(make_state(0), make_record(0))
