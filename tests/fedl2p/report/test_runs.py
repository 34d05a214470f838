"""Several runs on one page."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_page import read

from fedl2p.federation.state import RoundRecord
from fedl2p.report.page import write_page
from fedl2p.report.page.runs import group_runs, unique_names
from fedl2p.report.saved_run import SavedRun, plain_records


@pytest.fixture
def runs(results: dict[str, Any], history: list[RoundRecord]) -> list[SavedRun]:
    """Two seeds of one configuration, and one run of another."""
    made = []
    for seed, rounds, name in ((0, 60, "one"), (1, 60, "two"), (0, 9, "two")):
        own = copy.deepcopy(results)
        own["seed"] = seed
        config = {"class_path": "my.Data", "init_args": {"seed": seed}}
        own["config"] = {"seed": seed, "output_dir": f"runs/{name}", "rounds": rounds, "data": config}
        for method in own["methods"].values():
            for pool in {"seen", "unseen"} & set(method):
                method[pool]["accuracy"]["mean"] += 0.01 * seed
        made.append(SavedRun(name=name, results=own, history=plain_records(history)))
    return made


def test_runs_that_differ_in_their_seed_alone_are_a_group(runs: list[SavedRun]) -> None:
    assert group_runs(runs) == [[0, 1], [2]]


def test_equal_names_are_told_apart(runs: list[SavedRun]) -> None:
    assert unique_names(runs) == ["one", "two", "two (2)"]


def test_means_and_sd_over_seeds(tmp_path: Path, runs: list[SavedRun]) -> None:
    page = read(write_page(tmp_path / "report.html", runs))
    means = [100 * run.results["methods"]["fedl2p"]["seen"]["accuracy"]["mean"] for run in runs]
    over = f"{np.mean(means[:2]):.1f} ± {np.std(means[:2], ddof=1):.1f}"
    assert ["Method", "A, 2 runs", "one", "two", "two (2)"] in page.rows
    assert ["FedL2P", over, *(f"{mean:.1f}" for mean in means)] in page.rows
    assert ["two", "1", "Data", "A", "60", "47", "0.320", "yes"] in page.rows


def test_differences_are_over_the_clients_of_all_runs_of_a_group(tmp_path: Path, runs: list[SavedRun]) -> None:
    page = read(write_page(tmp_path / "report.html", runs))
    methods = runs[0].results["methods"]
    pairs = [
        row["accuracy"] - methods["ft_bn_c"]["seen"]["clients"][name]["accuracy"]
        for name, row in methods["fedl2p"]["seen"]["clients"].items()
    ]
    (row,) = [row for row in page.rows if row[:3] == ["FedL2P minus FT (BN C)", "seen", "A"]]
    assert row[3] == f"{100 * np.mean(pairs):+.2f}"
    assert row[5:] == ["16", "2"]


def test_every_run_has_its_sections_and_ids_are_unique(tmp_path: Path, runs: list[SavedRun]) -> None:
    text = write_page(tmp_path / "report.html", runs).read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {"run-1", "run-2", "run-3", "run-1-methods", "run-3-training"} <= set(ids)


def test_figures_of_the_first_run_and_of_all_are_written(tmp_path: Path, runs: list[SavedRun]) -> None:
    write_page(tmp_path / "report.html", runs, figures=tmp_path / "figures")
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"learning-curves", "accuracy", "gain-seen", "gain-unseen", "learning-curve"}


def test_a_run_without_results_stands_beside_others(tmp_path: Path, runs: list[SavedRun]) -> None:
    early = SavedRun(name="early", results={"config": runs[0].results["config"]}, finished=False)
    page = read(write_page(tmp_path / "report.html", [*runs[:2], early]))
    assert ["Method", "A, 3 runs", "one", "two", "early"] in page.rows
    assert any(row[0] == "early" and row[-1] == "no" for row in page.rows)
