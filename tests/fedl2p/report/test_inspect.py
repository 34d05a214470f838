"""`fedl2p inspect`: the right clients, in three forms."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedl2p.cli import main
from fedl2p.errors import RunFolderError
from fedl2p.report.hyperparameters import write_hyperparameters
from fedl2p.report.inspect import show_hyperparameters


@pytest.fixture
def folder(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    write_hyperparameters(tmp_path / "hyperparameters.csv", rows)
    return tmp_path


def test_csv_has_the_rows_of_the_chosen_clients(folder: Path, rows: list[dict[str, Any]]) -> None:
    text = show_hyperparameters(folder, clients=["client-02", "client-05"], kind="beta", form="csv")
    read = list(csv.DictReader(io.StringIO(text)))
    wanted = [row for row in rows if row["client"] in ("client-02", "client-05") and row["kind"] == "beta"]
    assert [{**row, "value": float(row["value"])} for row in read] == wanted


def test_json_has_layers_by_client(folder: Path, rows: list[dict[str, Any]]) -> None:
    found = json.loads(show_hyperparameters(folder, pool="unseen", form="json"))
    assert list(found) == ["client-08", "client-09", "client-10", "client-11"]
    assert found["client-09"]["domain"] == "b"
    value = next(row["value"] for row in rows if row["client"] == "client-09" and row["layer"] == "fc.weight")
    assert found["client-09"]["eta"]["fc.weight"] == value


def test_a_few_clients_stand_beside_each_other(folder: Path, rows: list[dict[str, Any]]) -> None:
    lines = show_hyperparameters(folder, clients=["client-02", "client-05"]).splitlines()
    assert "client-02 (a, seen), client-05 (b, seen)" in lines[0]
    own = {row["client"]: row["value"] for row in rows if row["layer"] == "layer1.0.bn2"}
    assert ["beta", "layer1.0.bn2", f"{own['client-02']:.4g}", f"{own['client-05']:.4g}"] in [x.split() for x in lines]


def test_of_many_clients_the_spread_is_shown(folder: Path, rows: list[dict[str, Any]]) -> None:
    lines = show_hyperparameters(folder, domain="a", kind="beta").splitlines()
    assert len(json.loads(show_hyperparameters(folder, domain="a", form="json"))) == 6
    assert "client-00 (a, seen)" in lines[0]
    lines = show_hyperparameters(folder, kind="beta").splitlines()
    own = [row["value"] for row in rows if row["layer"] == "layer1.0.bn1"]
    numbers = [f"{value:.4g}" for value in np.quantile(own, (0, 0.25, 0.5, 0.75, 1))]
    assert "12 clients" in lines[0]
    assert ["beta", "layer1.0.bn1", *numbers] in [line.split() for line in lines]


def test_what_is_not_there_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no client 'x'; the 12 clients are called client-00"):
        show_hyperparameters(folder, clients=["x"])
    with pytest.raises(RunFolderError, match="seen a, seen b, unseen a, unseen b"):
        show_hyperparameters(folder, pool="pretrain")
    with pytest.raises(RunFolderError, match=r"has no hyperparameters\.csv"):
        show_hyperparameters(tmp_path / "nowhere")


def test_the_command_prints_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--client", "client-02", "--kind", "eta", "--format", "json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["client-02"]) == ["domain", "pool", "eta"]
    assert main(["inspect", str(folder / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("fedl2p: ")


def test_the_report_command_names_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err
