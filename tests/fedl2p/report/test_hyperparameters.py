"""The long table of recipes."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedl2p import io as files
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.errors import ModelError, RunFolderError
from fedl2p.report.hyperparameters import COLUMNS, hyperparameter_rows, read_hyperparameters, write_hyperparameters

NETS = SimpleNamespace(batchnorm_names=("bn",), parameter_names=("conv.weight", "fc.weight"))
CLIENTS = [SimpleNamespace(name=name, domain="d,1", pool="seen") for name in ("a", 'b "two"')]


def recipe(beta: list[float], eta: list[float]) -> Hyperparameters:
    return Hyperparameters(torch.tensor(beta), torch.tensor(eta, dtype=torch.float64))


RECIPES = [recipe([0.25], [0.1, -3e-17]), recipe([1.0], [0.0, 1 / 3])]


def test_rows_name_client_layer_and_value() -> None:
    rows = hyperparameter_rows(CLIENTS, RECIPES, NETS)
    assert len(rows) == 6
    assert rows[0] == {"client": "a", "domain": "d,1", "pool": "seen", "kind": "beta", "layer": "bn", "value": 0.25}
    assert [(row["kind"], row["layer"], row["value"]) for row in rows[3:]] == [
        ("beta", "bn", 1.0),
        ("eta", "conv.weight", 0.0),
        ("eta", "fc.weight", 1 / 3),
    ]


def test_a_model_without_batch_norm_has_no_beta_rows() -> None:
    nets = SimpleNamespace(batchnorm_names=(), parameter_names=("fc.weight",))
    (row,) = hyperparameter_rows(CLIENTS[:1], [recipe([], [0.5])], nets)
    assert (row["kind"], row["value"]) == ("eta", 0.5)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ModelError, match="1 recipes for 2 clients"):
        hyperparameter_rows(CLIENTS, RECIPES[:1], NETS)
    with pytest.raises(ModelError, match="eta of client 'a' has the shape"):
        hyperparameter_rows(CLIENTS[:1], [recipe([0.0], [0.1])], NETS)


def test_the_file_gives_back_the_same_values(tmp_path: Path) -> None:
    rows = hyperparameter_rows(CLIENTS, RECIPES, NETS)
    path = write_hyperparameters(tmp_path / "run" / "hyperparameters.csv", rows)
    assert read_hyperparameters(path) == rows
    with path.open(newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    assert [entry.name for entry in path.parent.iterdir()] == ["hyperparameters.csv"]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", ",".join(COLUMNS) + "\na,d,seen,beta,bn,x\n"])
def test_another_table_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hyperparameters.csv"
    path.write_text(text)
    with pytest.raises(RunFolderError):
        read_hyperparameters(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hyperparameters.csv"
    path.write_text("old")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        write_hyperparameters(path, [])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
