"""The examples run as their headers say, and own_data.py gives FedL2P the lead that it promises."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedl2p

ROOT = Path(fedl2p.__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OFFLINE = "wandb.mode=disabled"


def run(*command: str | Path) -> str:
    """Runs `python ...` in the clone; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_what_it_is_how_to_run_it_and_how_long_it_takes(path: Path) -> None:
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert all(f"\n{word}: " in header for word in ("What", "Run", "Time"))
    assert f"python examples/{path.name}" in header


@pytest.mark.slow
def test_one_client_learns_in_a_trainer(tmp_path: Path) -> None:
    short = ["federation.rounds=0", "baselines.l2p=false", "baselines.shuffled=false", OFFLINE]
    run("-m", "fedl2p.cli", "run", "digits", *short, f"output_dir={tmp_path / 'run'}")
    assert "test_acc" in run("examples/one_client.py", tmp_path / "run")


@pytest.mark.slow
def test_own_data_show_what_reading_the_client_is_worth_and_serve_a_new_client(tmp_path: Path) -> None:
    run("examples/own_data.py", f"output_dir={tmp_path / 'run'}", OFFLINE)
    methods = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]
    for pool in ("seen", "unseen"):
        accuracy = {name: result[pool]["accuracy"]["mean"] for name, result in methods.items()}
        best = max(value for name, value in accuracy.items() if name.startswith("ft_"))
        assert accuracy["fedl2p"] > best + 0.1
    printed = run("examples/new_client.py", tmp_path / "run")
    assert "beta of features.1" in printed
    assert "eta of head.weight" in printed
