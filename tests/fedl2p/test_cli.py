"""The command line: help, one line for what is wrong, exit codes, and folders that are left alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedl2p
from fedl2p import cli
from fedl2p.cli import main
from fedl2p.errors import FederationError
from fedl2p.experiment import run as main_job

ROOT = Path(fedl2p.__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.yaml")
TINY = [
    "data.init_args.seen_clients=6",
    "data.init_args.unseen_clients=6",
    "data.init_args.pretrain_clients=2",
    "data.init_args.train_sizes=[8]",
    "model.init_args.widths=[4, 4, 4]",
    "pretraining.rounds=0",
    "wandb.mode=disabled",
]


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    """Runs with the overrides; asserts exit code 2, one line on stderr, nothing written; returns the line."""
    assert main(["run", DIGITS, *TINY, f"output_dir={folder / 'out'}", *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line != "Loading ..."]
    assert len(lines) == 1
    assert lines[0].startswith("fedl2p: ")
    assert not (folder / "out").exists()
    return lines[0]


# Help


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["run", "personalize", "--version"]),
        (
            ["run", "--help"],
            ["--resume", "--dry-run", "configs/digits.yaml", "key=value", "data.class_path", "output_dir"],
        ),
    ],
)
def test_help_explains(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert fedl2p.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["run"], ["walk"], ["run", DIGITS, "--nonsense"]])
def test_a_wrong_command_line_is_an_error_with_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "fedl2p.cli", "run", "nowhere.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "fedl2p: The configuration file 'nowhere.yaml' does not exist.\n"
    assert done.stdout == ""


# One line for what is wrong


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("foo=1", ["'foo'", "known there are"]),
        ("federation.foo=1", ["'federation.foo'", "rounds"]),
        ("seed=abc", ["'seed'", "Integer"]),
        ("seed=-1", ["seed is -1", "0 or more"]),
        ("federation.client_fraction=0", ["federation.client_fraction", "above 0 and at most 1"]),
        ("federation.patience=-3", ["federation.patience", "1 or more"]),
        ("federation.client_fraction=0.01", ["federation.client_fraction", "0.167 or more"]),
        ("data.init_args.seen_clients=5000", ["data.init_args", "seen clients", "choose fewer clients"]),
        ("data.init_args.pretrain_clients=5000", ["pretrain_clients is 5000", "1 to 53"]),
        ("data.init_args.batch_size=0", ["data.init_args", "batch_size is 0", "at least 1"]),
        ("data.init_args.alpha=0", ["alpha is 0", "positive"]),
        ("data.init_args.foo=1", ["'data.init_args.foo'", "seen_clients"]),
        ("data.class_path=nowhere.Data", ["data.class_path 'nowhere.Data'", "nowhere"]),
        ("data.class_path=fedl2p.datamodules.Nothing", ["data.class_path", "Nothing"]),
        ("data.class_path=Digits", ["data.class_path", "package.module.Name"]),
        ("data.class_path=os.path.sep", ["data.class_path", "a class or function"]),
        ("data.class_path=os.path.join", ["data.init_args", "missing 1 required", "'a'"]),
        ("data.class_path=os.getcwd", ["data.class_path", "makes a str", "FederatedDataModule"]),
        ("data.class_path=collections.OrderedDict", ["data.class_path", "FederatedDataModule"]),
        ("model.class_path=collections.OrderedDict", ["model.class_path", "Module"]),
        ("model.init_args.foo=1", ["'model.init_args.foo'", "widths"]),
        ("model.init_args.num_classes=3", ["model", "(3,)", "10 classes"]),
        ("model.init_args.in_channels=3", ["model", "(1, 8, 8)"]),
        ("trainer.foo=1", ["'trainer.foo'", "lightning.Trainer"]),
        ("trainer.accelerator=abacus", ["trainer", "abacus", "cpu"]),
        ("trainer.precision=7", ["trainer", "7", "64-true"]),
        ("hypergradient.init_args.foo=1", ["'hypergradient.init_args.foo'", "steps"]),
        ("hypergradient.init_args.steps=0", ["hypergradient.init_args", "1 or more"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, words: list[str]
) -> None:
    line = refused(capsys, tmp_path, override)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("key", ["batch_size", "alpha", "seen_clients", "train_sizes"])
def test_a_wrong_type_of_a_component_s_argument_names_the_argument(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str
) -> None:
    assert key in refused(capsys, tmp_path, f"data.init_args.{key}=abc")


@pytest.mark.parametrize("override", ["trainer.limit_train_batches=-1", "trainer.devices=0", "trainer.max_epochs=-5"])
def test_an_impossible_value_of_the_trainer_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str
) -> None:
    assert override.partition("=")[0].partition(".")[2] in refused(capsys, tmp_path, override)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("widths", ["[-1]", "[0]"])
def test_an_impossible_size_of_the_model_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, widths: str
) -> None:
    assert "model" in refused(capsys, tmp_path, f"model.init_args.widths={widths}")


def test_a_model_argument_that_fails_in_the_first_pass_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "model" in refused(capsys, tmp_path, "model.init_args.momentum=abc")


def test_a_relative_class_path_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "data.class_path" in refused(capsys, tmp_path, "data.class_path=.digits.Data")


def test_weights_that_are_none_are_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "digits.yaml" in refused(capsys, tmp_path, f"pretraining.weights={DIGITS}")


def test_the_data_are_swapped_as_the_help_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli, "run", lambda config, resume: seen.append(config) or 0)
    swap = ["data.class_path=my_package.MyData", "data.init_args={path: /data}"]
    assert main(["run", DIGITS, *swap]) == 0
    assert seen[0].data.init_args == {"path": "/data"}


# Folders


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text("precious")
    assert main(["run", DIGITS, *TINY, f"output_dir={tmp_path / 'old'}"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["results.json"]
    assert (tmp_path / "old" / "results.json").read_text() == "precious"


def test_a_file_in_the_place_of_the_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert main(["run", DIGITS, *TINY, f"output_dir={tmp_path / 'file'}"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert main(["run", DIGITS, *TINY, f"output_dir={tmp_path / 'file' / 'below'}"]) == 2
    assert "output_dir" in capsys.readouterr().err


def test_there_must_be_something_to_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no run to resume" in refused(capsys, tmp_path, "--resume")


# Exit codes


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FederationError("too few\nclients"), 1, "fedl2p: too few clients"),
        (KeyboardInterrupt(), 130, "--resume"),
    ],
)
def test_errors_while_running_have_codes_of_their_own(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
    code: int,
    words: str,
) -> None:
    (tmp_path / "config.yaml").write_text("something to resume")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(main_job, "run", fail)
    assert main(["run", DIGITS, *TINY, f"output_dir={tmp_path}"]) == code
    assert words in capsys.readouterr().err


def test_a_reader_who_has_enough_is_no_error() -> None:
    listing = f"{sys.executable} -m fedl2p.cli keys; echo $? >&2"
    done = subprocess.run(f"({listing}) | head -n 1", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1
    assert done.stderr.strip() == "0"
