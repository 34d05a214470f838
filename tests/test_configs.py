"""Every configuration that comes with the project says how to run it, loads, and runs to the end when made tiny."""

import importlib
import json
from pathlib import Path

import pytest

import fedl2p
from fedl2p.cli import main
from fedl2p.experiment.config import load_config

CONFIGS = sorted((Path(fedl2p.__file__).parents[1] / "configs").rglob("*.yaml"))
TINY_DIGITS = {
    "data.init_args.seen_clients": 6,
    "data.init_args.unseen_clients": 6,
    "data.init_args.pretrain_clients": 2,
    "data.init_args.train_sizes": [8],
    "model.init_args.widths": [4, 4, 4],
}
SHORT = [
    "pretraining.rounds=1",
    "client.finetune_epochs=1",
    "client.meta_iterations=1",
    "federation.rounds=1",
    "wandb.mode=disabled",
]


def test_there_are_configurations() -> None:
    assert "digits.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_configuration_begins_with_how_to_run_it_and_how_long_it_takes(path: Path) -> None:
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line)
    text = "\n".join(comment)
    assert f"fedl2p run configs/{path.name}" in text
    assert "Run:" in text
    assert "Time:" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_configuration_loads_and_the_seed_reaches_the_data(path: Path) -> None:
    config = load_config([str(path), "seed=17"])
    assert config.seed == 17
    assert config.data.init_args.get("seed") == 17
    assert config.output_dir.startswith("runs/")


def tiny(path: Path, folder: Path) -> list[str]:
    """What makes a configuration tiny; data that it would have to fetch are made in `folder`, as `tiny_data` says."""
    overrides = TINY_DIGITS if path.stem == "digits" else importlib.import_module(f"tiny_data.{path.stem}").make(folder)
    return [f"{key}={value}" for key, value in overrides.items()]


SMALL = {"digits", "digits_two_domains", "femnist", "image_folder", "tensors"}  # the others have a large network


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.name, marks=[] if path.stem in SMALL else pytest.mark.slow) for path in CONFIGS],
)
def test_a_configuration_runs_to_the_end_when_made_tiny(path: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    options = [*tiny(path, tmp_path / "data"), *SHORT]
    assert main(["run", str(path), *options, f"output_dir={tmp_path / 'run'}"]) == 0
    methods = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]
    assert 0 <= methods["fedl2p"]["seen"]["accuracy"]["mean"] <= 1
