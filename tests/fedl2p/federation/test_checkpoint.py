"""The state of the rounds on disk."""

import json
import math
from pathlib import Path

import pytest
import torch

from fedl2p import io
from fedl2p.errors import RunFolderError
from fedl2p.federation.checkpoint import FILE_NAME, load_state, save_state
from fedl2p.federation.state import MetaState, RoundRecord
from fedl2p.io import write_tensors


def make_state() -> MetaState:
    first = {"base_lr": torch.randn(3), "scalar": torch.tensor(2.0), "double": torch.randn(2, 2).double()}
    second = {name: t + 1 for name, t in first.items()}
    state = MetaState(lambda_=first, best_lambda=first)
    state.add(RoundRecord(round=0, val_loss=1.5), first)
    record = RoundRecord(
        round=1,
        val_loss=2.5,
        meta_loss=1.25,
        clients=("a", "b"),
        failures={"c": "ValueError: no"},
        skipped_steps=2,
        seconds=0.5,
    )
    state.add(record, second)
    return state


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = make_state()
    save_state(tmp_path / "new" / "folder", state)
    loaded = load_state(tmp_path / "new" / "folder")
    assert loaded is not None
    assert loaded.history == state.history
    assert (loaded.best_loss, loaded.best_round, loaded.round) == (1.5, 0, 1)
    for now, then in ((loaded.lambda_, state.lambda_), (loaded.best_lambda, state.best_lambda)):
        assert set(now) == set(then)
        for name, tensor in then.items():
            assert torch.equal(now[name], tensor)
            assert now[name].dtype == tensor.dtype
            assert now[name].shape == tensor.shape


def test_losses_that_are_not_finite_come_back(tmp_path: Path) -> None:
    lambda_ = {"a": torch.zeros(1)}
    state = MetaState(lambda_=lambda_, best_lambda=lambda_)
    state.add(RoundRecord(round=0, val_loss=math.inf, meta_loss=math.nan), lambda_)
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert math.isinf(loaded.best_loss)
    assert loaded.history[0].meta_loss is not None and math.isnan(loaded.history[0].meta_loss)


def test_where_nothing_was_saved_there_is_no_state(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "nowhere") is None


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    save_state(tmp_path, state)
    before = (tmp_path / FILE_NAME).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(io.os, "fsync", full)
    state.add(RoundRecord(round=2, val_loss=0.5), state.lambda_)
    with pytest.raises(RunFolderError, match="disk full"):
        save_state(tmp_path, state)
    assert (tmp_path / FILE_NAME).read_bytes() == before
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.round == 1


def test_nothing_but_the_file_is_left_in_the_folder(tmp_path: Path) -> None:
    save_state(tmp_path, make_state())
    save_state(tmp_path, make_state())
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("damage", [b"", b"not tensors at all", None], ids=["empty", "other", "cut short"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes | None) -> None:
    save_state(tmp_path, make_state())
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    with pytest.raises(RunFolderError, match=f"{FILE_NAME} is damaged"):
        load_state(tmp_path)


def test_tensors_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / FILE_NAME, {"lambda/a": torch.zeros(1)}, {})
    with pytest.raises(RunFolderError, match=FILE_NAME):
        load_state(tmp_path)


def test_a_record_as_plain_values_is_json() -> None:
    values = RoundRecord(round=3, val_loss=math.inf, meta_loss=math.nan, clients=("a",)).as_dict()
    assert json.loads(json.dumps(values, allow_nan=False))["val_loss"] is None
    assert values["meta_loss"] is None
    assert values["clients"] == ["a"]
