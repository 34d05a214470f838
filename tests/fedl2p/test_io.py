"""Files are written whole or not at all, all in one way."""

import errno
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedl2p import io
from fedl2p.errors import RunFolderError
from fedl2p.io import load_tensors, read_json, read_tensors, to_json, write_atomically, write_json, write_tensors


def test_every_kind_of_file_gets_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "text", "a")
        write_json(tmp_path / "json", {})
        write_tensors(tmp_path / "tensors", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write_atomically(tmp_path / "a.json", "old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(io.os, broken, full)
    for write in (lambda path: write_json(path, [1]), lambda path: write_tensors(path, {"a": torch.zeros(1)})):
        with pytest.raises(RunFolderError, match=r"a\.json: No space left on device\.$"):
            write(tmp_path / "a.json")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from fedl2p import io; io.os.replace = lambda *paths: os._exit(9); "
        "io.write_atomically(sys.argv[1], 'text')"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "below" / "a.txt")])
    assert killed.returncode == 9
    assert len(list((tmp_path / "below").iterdir())) == 1
    (tmp_path / ".mine").write_text("mine")
    io.remove_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".mine"]


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    assert json.loads(to_json({1: math.nan, "b": (math.inf, 2.5), "c": [{"d": -math.inf}]})) == {
        "1": None,
        "b": [None, 2.5],
        "c": [{"d": None}],
    }
    assert read_json(tmp_path / "none.json") is None
    assert read_json(write_json(tmp_path / "x.json", [math.nan])) == [None]


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path: Path) -> None:
    # Safetensors' own writer gives metadata in another order in every process.
    program = (
        "import sys, torch; from fedl2p.io import write_tensors; "
        "write_tensors(sys.argv[1], {n: torch.ones(3) for n in ('b', 'a')}, {str(i): 'x' for i in range(20)})"
    )
    for name in ("one", "two", "three"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True)
    assert len({(tmp_path / name).read_bytes() for name in ("one", "two", "three")}) == 1
    assert read_tensors(tmp_path / "one")[1] == {str(i): "x" for i in range(20)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_tensors_come_back_beside_any_metadata(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(5).to(dtype), "scalar": torch.tensor(3).to(dtype), "empty": torch.zeros(0, 2)}
    path = write_tensors(tmp_path / "x.safetensors", tensors, {"words": 'quoted " and \u00e9\n', "b": ""})
    loaded = load_tensors(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert read_tensors(path)[1] == {"words": 'quoted " and \u00e9\n', "b": ""}


def test_tensors_and_metadata_of_any_file(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    write_tensors(tmp_path / "x.safetensors", {"a": shared, "b": shared[:3]}, {"k": "v"})
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(loaded["b"], shared[:3])
    assert read_tensors(tmp_path / "x.safetensors")[1] == {"k": "v"}
    with pytest.raises(RunFolderError, match="nothing"):
        load_tensors(tmp_path / "nothing.safetensors")


def test_loaded_tensors_lie_in_memory_as_torch_s_own_do(tmp_path: Path) -> None:
    # A matrix-vector product rounds otherwise where its weights are not aligned, so a resumed run would not repeat.
    tensors = {f"t{size}": torch.zeros(size) for size in (1, 2, 3, 5, 7, 11)}
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    assert {t.data_ptr() % 64 for t in load_tensors(tmp_path / "x.safetensors").values()} == {0}


def test_tensors_of_any_memory_layout_can_be_written(tmp_path: Path) -> None:
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    write_tensors(tmp_path / "x.safetensors", {"weight": weight}, {})
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["weight"], weight)
