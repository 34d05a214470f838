"""Weight files are read without running code, and fit wholly or are refused by name."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedl2p.errors import ModelError
from fedl2p.models import load_weights, read_weights


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, classes))


def write_plain(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path)


def write_wrapped(path: Path, state: dict[str, Any]) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}, path)


def write_old(path: Path, state: dict[str, Any]) -> None:
    kept = {name: t for name, t in state.items() if "num_batches" not in name}
    torch.save({"state_dict": kept}, path, _use_new_zipfile_serialization=False)


def write_safetensors(path: Path, state: dict[str, Any]) -> None:
    save_file(state, path)


@pytest.mark.parametrize(
    ("write", "suffix"),
    [(write_plain, "pt"), (write_wrapped, "tar"), (write_old, "th"), (write_safetensors, "safetensors")],
)
def test_all_kinds_of_files_give_the_same_model(
    tmp_path: Path, write: Callable[[Path, dict[str, Any]], None], suffix: str
) -> None:
    source, target = net(), net()
    path = tmp_path / f"weights.{suffix}"
    write(path, source.state_dict())
    load_weights(target, path)
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in target.state_dict().items())


def test_a_head_for_other_classes_is_left_new_where_it_is_named(tmp_path: Path) -> None:
    torch.save(net(5).state_dict(), tmp_path / "w.pt")
    target = net(3)
    before = target[3].weight.clone()
    with pytest.raises(ModelError, match=r"2 of another shape: 3\.weight \(5, 8\) for \(3, 8\), 3\.bias \(5,\) for"):
        load_weights(target, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt", head="3")
    assert torch.equal(target[3].weight, before)
    assert torch.equal(target[0].weight, torch.load(tmp_path / "w.pt")["0.weight"])


def test_a_head_of_another_width_is_no_other_task(tmp_path: Path) -> None:
    state = net().state_dict() | {"3.weight": torch.zeros(3, 9)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"1 of another shape: 3\.weight \(3, 9\) for \(3, 8\)"):
        load_weights(net(), tmp_path / "w.pt", head="3")


def test_missing_and_unknown_tensors_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = {f"extra{i}": torch.zeros(1) for i in range(5)} | net().state_dict()
    del state["0.weight"]
    torch.save(state, tmp_path / "w.pt")
    target = net()
    before = target[3].bias.clone()
    with pytest.raises(ModelError, match=r"1 missing: 0\.weight; 5 unknown: extra0, extra1, extra2, \.\.\."):
        load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target[3].bias, before)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [False, True])
def test_nothing_in_a_file_is_run(tmp_path: Path, plain: bool) -> None:
    trap, path = tmp_path / "trap", tmp_path / "w.pt"
    if plain:
        path.write_bytes(pickle.dumps(Evil(trap)))
    else:
        torch.save({"state_dict": net().state_dict(), "more": Evil(trap)}, path)
    with pytest.raises(ModelError, match=r"w\.pt"):
        read_weights(path)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 200, 0.5, 0.95])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"weights.{suffix}"
    (write_safetensors if suffix == "safetensors" else write_plain)(path, net().state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(ModelError, match=rf"weights\.{suffix}"):
        read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"a": 1}, torch.zeros(2)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds no tensors by name"):
        read_weights(tmp_path / "w.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.pt' does not exist"):
        read_weights(tmp_path / "nowhere.pt")
