"""A run's life: from Python, stopped, taken up again, extended, with W&B broken, and only estimated."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import fedl2p
from fedl2p.cli import main
from fedl2p.errors import ConfigError, FederationError, RunFolderError
from fedl2p.experiment import run as run_module
from fedl2p.experiment.config import load_config
from fedl2p.experiment.context import prepare
from fedl2p.experiment.dry_run import estimate_run
from fedl2p.experiment.folder import RunFolder
from fedl2p.experiment.run import run
from fedl2p.io import load_tensors

ROOT = Path(fedl2p.__file__).parents[1]
SAME = ("methods", "comparisons", "rounds")


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# From Python


def test_a_run_from_python_takes_files_pairs_and_dictionaries_and_gives_the_results(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ({"federation": {"rounds": 2}}, f"output_dir={tmp_path / 'run'}")
    results = run(Path(mine), "seed=5", *parts, quiet=True)
    assert capsys.readouterr() == ("", "")
    assert json.loads(json.dumps(results)) == results_of(tmp_path / "run")
    assert (results["seed"], results["rounds"]["last"]) == (5, 2)
    again = run(load_config([mine, "seed=5", *parts, f"output_dir={tmp_path / 'again'}"]))
    captured = capsys.readouterr()
    assert "FedL2P" in captured.out
    assert captured.out.splitlines()[-1] == str(tmp_path / "again")
    assert all(again[key] == results[key] for key in SAME)


def test_a_mistake_from_python_is_our_error_and_nothing_is_written(mine: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'federation\.foo'"):
        run(mine, {"federation": {"foo": 1}}, f"output_dir={tmp_path / 'run'}")
    with pytest.raises(ConfigError, match="No configuration file"):
        run("seed=1")
    assert not (tmp_path / "run").exists()


# Files


def test_no_temporary_file_is_left_and_all_have_the_same_mode(mine: str, tmp_path: Path) -> None:
    run(mine, f"output_dir={tmp_path / 'run'}", quiet=True)
    paths = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in paths}) == 1
    assert not [path for path in paths if path.name.startswith(".")]


def test_the_same_run_writes_the_same_nets_byte_for_byte(mine: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(mine, f"output_dir={tmp_path / name}", quiet=True)
    for name in ("meta_nets.safetensors", "global_model.safetensors", "checkpoints/l2p.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_two_processes_cannot_be_at_work_in_one_folder(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(mine, f"output_dir={tmp_path / 'run'}", quiet=True)
    before = {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in files(tmp_path / "run")}
    folder = RunFolder(tmp_path / "run")
    with folder.opened((tmp_path / "run" / "config.yaml").read_text(), resume=True):
        assert main(["run", mine, f"output_dir={tmp_path / 'run'}", "--resume"]) == 2
        assert main(["run", mine, f"output_dir={tmp_path / 'run'}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "Loading ..."]
    assert (
        lines
        == [f"fedl2p: Another process is at work in output_dir '{tmp_path / 'run'}'; wait for its end, or stop it."] * 2
    )
    assert {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in files(tmp_path / "run")} == before
    assert main(["run", mine, f"output_dir={tmp_path / 'run'}", "--resume"]) == 0


# Extending


def test_a_finished_run_that_gets_more_rounds_is_the_longer_run(mine: str, tmp_path: Path) -> None:
    short, longer = ("federation.rounds=1", "federation.client_fraction=1"), "federation.rounds=3"
    run(mine, *short, f"output_dir={tmp_path / 'run'}", quiet=True)
    run(mine, *short, longer, f"output_dir={tmp_path / 'run'}", quiet=True, resume=True)
    run(mine, *short, longer, f"output_dir={tmp_path / 'whole'}", quiet=True)
    extended, whole = results_of(tmp_path / "run"), results_of(tmp_path / "whole")
    assert all(extended[key] == whole[key] for key in SAME)
    assert extended["methods"]["l2p"]["settings"] == {"meta_iterations": 3}
    assert extended["config"]["federation"]["rounds"] == 3
    assert load_config([str(tmp_path / "run" / "config.yaml")]).federation.rounds == 3
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    for name in ("meta_nets.safetensors", "hyperparameters.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nothing_else_may_change_with_the_rounds(mine: str, tmp_path: Path) -> None:
    run(mine, f"output_dir={tmp_path / 'run'}", quiet=True)
    before = (tmp_path / "run" / "config.yaml").read_text()
    for change in ("federation.patience=7", "pretraining.epochs=3"):
        with pytest.raises(RunFolderError, match=r"Only federation\.rounds may grow"):
            run(mine, "federation.rounds=3", change, f"output_dir={tmp_path / 'run'}", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


# W&B


def test_the_folder_is_there_before_wandb_and_an_interruption_there_can_be_resumed(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "start_wandb", lambda **options: interrupted())
        assert main(["run", mine, f"output_dir={tmp_path / 'run'}"]) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(["run", mine, f"output_dir={tmp_path / 'run'}", "--resume"]) == 0


@pytest.mark.parametrize("broken", ["at the start", "in the rounds"])
def test_wandb_that_fails_is_one_warning(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    class Broken:
        id, step = "an-id", 0

        def log(self, *arguments: object, **options: object) -> None:
            raise ConnectionError("no\nserver")

        finish = log

    def start(**options: object) -> Broken:
        if broken == "at the start":
            raise ConnectionError("no\nserver")
        return Broken()

    monkeypatch.setattr(run_module, "start_wandb", start)
    assert main(["run", mine, f"output_dir={tmp_path / 'run'}"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning")]
    assert len(warnings) == 1
    assert "ConnectionError: no server" in warnings[0] and "goes on without it" in warnings[0]
    assert "fedl2p" in results_of(tmp_path / "run")["methods"]


def test_a_resumed_run_goes_on_with_its_wandb_run(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Fake:
        id, step = "an-id", 0

        def __init__(self) -> None:
            self.summary: dict[str, float] = {}

        def log(self, *arguments: object, **options: object) -> None:
            pass

        finish = log

    monkeypatch.setattr(run_module, "start_wandb", lambda **options: asked.append(options["run_id"]) or Fake())
    run(mine, f"output_dir={tmp_path / 'run'}", quiet=True)
    run(mine, f"output_dir={tmp_path / 'run'}", quiet=True, resume=True)
    assert asked == [None, "an-id"]


# Interruptions


def test_an_interrupted_run_has_a_page_and_a_finished_one_another(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "local_policies", interrupted)
        assert main(["run", mine, f"output_dir={folder}"]) == 130
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "This run has not come to its end" in page
    assert all(f"<h2>{title}</h2>" in page for title in ("Training", "Who has what", "Configuration"))
    assert "<h2>Methods</h2>" not in page
    assert main(["run", mine, f"output_dir={folder}", "--resume"]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "This run has not come to its end" not in page
    assert all(f"<h2>{title}</h2>" in page for title in ("Methods", "Learned β and η", "Cost", "Clients"))
    assert {"accuracy.svg", "accuracy.pdf", "beta.svg", "eta.pdf"} <= set(os.listdir(folder / "figures"))


def test_a_page_that_cannot_be_written_does_not_hide_why_a_run_stopped(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*arguments: object) -> None:
        (tmp_path / "run" / "metrics.jsonl").write_text("damaged\n{}\n")
        raise FederationError("too few clients")

    monkeypatch.setattr(run_module, "local_policies", failing)
    assert main(["run", mine, f"output_dir={tmp_path / 'run'}"]) == 1
    assert "too few clients" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists()


def program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder / 'code'}"}
    command = [sys.executable, "-m", "fedl2p.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_is_one_line(mine: str, tmp_path: Path, number: signal.Signals) -> None:
    stopping = (
        "import os\ntry:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "except KeyboardInterrupt:\n    raise ImportError('half')\n"
    )
    (tmp_path / "code" / "stopping.py").write_text(stopping)
    done = program(tmp_path, "run", mine, "data.class_path=stopping.Data", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 130
    assert done.stderr == f"Loading ...\n\nfedl2p: Interrupted; nothing was written to {tmp_path / 'run'}.\n"
    assert not (tmp_path / "run").exists()


def test_a_signal_in_a_run_names_the_folder_and_a_killed_run_goes_on(mine: str, tmp_path: Path) -> None:
    stopping = (
        "import os, signal\nfrom my_package import MyNet\n\n\nclass Net(MyNet):\n    def forward(self, inputs):\n"
        "        number = os.environ.get('STOP')\n"
        f"        if number and os.path.exists({str(tmp_path / 'run' / 'checkpoints' / 'rounds.safetensors')!r}):\n"
        "            os.kill(os.getpid(), int(number))\n"
        "        return super().forward(inputs)\n"
    )
    (tmp_path / "code" / "stopping.py").write_text(stopping)
    arguments = ["run", mine, "model.class_path=stopping.Net", "federation.rounds=2"]
    there = f"output_dir={tmp_path / 'run'}"
    os.environ["STOP"] = str(int(signal.SIGTERM))
    try:
        done = program(tmp_path, *arguments, there)
        assert done.returncode == 130
        assert done.stderr.splitlines()[-1] == (
            f"fedl2p: Interrupted; the same command with {there} and --resume goes on with the run in "
            f"{tmp_path / 'run'}."
        )
        assert "Traceback" not in done.stderr
        os.environ["STOP"] = str(int(signal.SIGKILL))
        assert program(tmp_path, *arguments, there, "--resume").returncode == -signal.SIGKILL
    finally:
        del os.environ["STOP"]
    assert program(tmp_path, *arguments, there, "--resume").returncode == 0
    assert main([*arguments, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert all(results_of(tmp_path / "run")[key] == results_of(tmp_path / "whole")[key] for key in SAME)
    assert not [name for name in files(tmp_path / "run") if name.endswith(".tmp")]


def test_a_second_signal_ends_the_process_at_once_without_a_word() -> None:
    lines = (
        "import atexit, os, signal",
        "from fedl2p.cli import main, make_parser",
        "import fedl2p.experiment.config as config",
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT) or print('late'))",
        "config.load_config = lambda arguments: os.kill(os.getpid(), signal.SIGINT)",
        "raise SystemExit(main(['run', 'x.yaml']))",
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nfedl2p: Interrupted.\n")


def test_the_command_s_signal_handlers_go_with_it_and_other_threads_need_none(mine: str, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    codes: list[int] = []
    wrong = ["run", mine, "seed=-1", f"output_dir={tmp_path / 'run'}"]
    thread = threading.Thread(target=lambda: codes.append(main(wrong)))
    thread.start()
    thread.join()
    codes.append(main(wrong))
    assert codes == [2, 2]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# The same data every time


def test_data_that_draw_from_the_global_generators_are_the_same_when_a_run_goes_on(mine: str, tmp_path: Path) -> None:
    arguments = (mine, "data.init_args.drawn=globally", "seed=4")
    run(*arguments, f"output_dir={tmp_path / 'run'}", quiet=True)
    whole = results_of(tmp_path / "run")
    for name in ("results.json", "checkpoints/l2p.safetensors", "checkpoints/rounds.safetensors"):
        (tmp_path / "run" / name).unlink()
    torch.rand(7)  # another state than the first run began with
    run(*arguments, f"output_dir={tmp_path / 'run'}", quiet=True, resume=True)
    assert all(results_of(tmp_path / "run")[key] == whole[key] for key in SAME)


def test_data_that_are_others_each_time_are_refused_with_the_first_client(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", mine, "data.init_args.drawn=anew", f"output_dir={tmp_path / 'run'}"]
    assert main(arguments) == 0
    before = files(tmp_path / "run")
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "Loading ..."]
    assert len(lines) == 1
    assert "first at client 'm0'" in lines[0]
    assert files(tmp_path / "run") == before


# Weights and rates that are given


def test_weights_replace_pretraining(mine: str, tmp_path: Path) -> None:
    run(mine, f"output_dir={tmp_path / 'first'}", "federation.rounds=0", quiet=True)
    weights = tmp_path / "first" / "global_model.safetensors"
    more = (f"pretraining.weights={weights}", "pretraining.rounds=3", "pretraining.pool=seen", "federation.rounds=0")
    run(mine, *more, f"output_dir={tmp_path / 'run'}", quiet=True)
    given, kept = load_tensors(weights), load_tensors(tmp_path / "run" / "global_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in given.items())


def test_a_run_in_which_no_rate_helps_goes_on_and_says_so(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "fedl2p.experiment.stages.tune_rate", lambda loss_of, rates: (0.1, {0.1: float("inf"), 0.3: float("inf")})
    )
    arguments = ["run", mine, f"output_dir={tmp_path / 'run'}"]
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("no rate lowered the validation loss; the lowest one was taken (0.1).") == 4
    methods = results_of(tmp_path / "run")["methods"]
    settings = methods["ft_bn_c"]["settings"]
    assert settings["note"] == "no rate lowered the validation loss; the lowest one was taken"
    assert (settings["rate"], settings["val_loss"], methods["fedl2p"]["settings"]["base_lr"]) == (0.1, None, 0.1)
    assert main([*arguments, "--resume"]) == 0
    assert results_of(tmp_path / "run")["methods"] == methods


def test_rates_of_an_earlier_run_spare_the_search(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(mine, f"output_dir={tmp_path / 'first'}", quiet=True)
    first = results_of(tmp_path / "first")["methods"]
    rates = {name: first[name]["settings"]["rate"] for name in ("ft_bn_c", "ft_bn_g", "ft_bn_i", "auto_rgn")}
    given = {
        "baselines": {"tune": False, "tuned_rates": rates},
        "meta_nets": {"base_lr": first["fedl2p"]["settings"]["base_lr"]},
    }
    again = run(mine, given, f"output_dir={tmp_path / 'run'}", quiet=True)["methods"]
    assert not (tmp_path / "run" / "checkpoints" / "tuning.json").exists()
    for name in first:
        for pool in ("seen", "unseen"):
            assert again[name].get(pool) == first[name].get(pool)
    arguments = ["run", mine, f"output_dir={tmp_path / 'bad'}", "baselines.tune=false"]
    assert main(arguments) == 2
    assert "meta_nets.base_lr is None" in capsys.readouterr().err
    assert main([*arguments, "meta_nets.base_lr=0.1", "baselines.tuned_rates={ft_bn_c: 0.1}"]) == 2
    assert "ft_bn_g" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


# An estimate


def test_a_dry_run_prints_clients_steps_time_and_memory_and_writes_nothing(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", mine, f"output_dir={tmp_path / 'run'}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in ("3 seen, 2 unseen", "tuning", "rounds", "l2p", "evaluation", "inner steps", "hours", "GB"):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_the_steps_of_an_estimate_are_those_of_the_run(mine: str, tmp_path: Path) -> None:
    overrides = (
        "client.finetune_epochs=7",
        "client.meta_iterations=2",
        "federation.rounds=5",
        "federation.client_fraction=1",
    )
    estimate = estimate_run(prepare(load_config([mine, *overrides, f"output_dir={tmp_path / 'run'}"])))
    # Clients of 6, 7 and 8 samples, in batches of 4; unseen ones of 9 and 10.
    seen, unseen = 7 * 6, 7 * 6
    stages = {stage.name: stage for stage in estimate.stages}
    assert stages["pretraining"].steps == 0
    assert stages["tuning"].steps == 4 * 2 * seen
    assert stages["rounds"].steps == (5 * 2 + 6) * seen
    assert stages["l2p"].steps == 5 * 2 * seen
    assert stages["evaluation"].steps == (5 + 2 * 7 + 5) * (seen + unseen)
    assert stages["refinement"].steps == 2 * 4 * (seen + unseen)
    assert stages["recommendation"].steps == 2 * (4 + 4) * seen
    assert all(stage.seconds > 0 for stage in estimate.stages[1:])
    assert 1e7 < estimate.memory < 1e12


@pytest.mark.slow
def test_the_estimated_time_of_the_rounds_is_of_the_right_order(tmp_path: Path) -> None:
    digits = str(ROOT / "configs" / "digits.yaml")
    arguments = (digits, "federation.rounds=6", "pretraining.rounds=2", "baselines.l2p=false", "wandb.enabled=false")
    estimate = estimate_run(prepare(load_config([*arguments, f"output_dir={tmp_path / 'run'}"])))
    estimated = {stage.name: stage.seconds for stage in estimate.stages}
    measured = run(*arguments, f"output_dir={tmp_path / 'run'}", quiet=True)["timings"]
    assert measured["rounds"] / 3 < estimated["rounds"] < 3 * measured["rounds"]
