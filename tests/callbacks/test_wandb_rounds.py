"""Rounds, recipes and results in a wandb run: in a fake one, and in a real one without a network."""

import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedl2p.callbacks import WandbRounds, start_wandb, wandb_rounds
from fedl2p.federation.state import MetaState, RoundRecord

MakeState = Callable[[int], MetaState]
MakeRecord = Callable[..., RoundRecord]

ROW = {"client": "a", "domain": "x", "pool": "seen", "kind": "beta", "layer": "bn1", "value": 0.5}
RESULTS: dict[str, Any] = {
    "methods": {
        "fedl2p": {
            "label": "FedL2P",
            "settings": {"accuracy": 3},
            "seen": {"accuracy": {"mean": 0.9}},
            "unseen": {"accuracy": {"mean": 0.8}},
        },
        "l2p": {"seen": {"accuracy": {"mean": math.nan}}, "unseen": None},
    }
}


class FakeRun:
    """Keeps what a wandb run would send."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.summary: dict[str, float] = {}

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((step, values))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No login and no folder of the machine, and the process's environment as it was afterwards."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["NETRC"] = str(tmp_path / "no-netrc")
    monkeypatch.setattr(wandb_rounds, "_set_here", {})
    yield
    os.environ.clear()
    os.environ.update(before)


def test_each_round_is_one_log_at_its_number(make_state: MakeState, make_record: MakeRecord) -> None:
    run, state = FakeRun(), make_state(-1)
    callback = WandbRounds(run=run)
    callback.on_rounds_start(state, 7)
    for number in range(8):
        state.add(make_record(number), {})
        callback.on_round_end(state, state.history[-1])
    callback.on_rounds_end(state)
    assert [step for step, _ in run.logged] == list(range(8))
    assert "meta_loss" not in run.logged[0][1]
    assert run.logged[2][1]["failures"] == 1
    assert run.logged[7][1] == {
        "val_loss": 1.2,
        "best_val_loss": 1.0,
        "best_round": 5,
        "meta_loss": 2.0,
        "clients": 2,
        "failures": 0,
        "skipped_steps": 1,
        "seconds": 3.0,
    }


def test_a_resumed_federation_sends_a_new_run_the_whole_curve(make_state: MakeState) -> None:
    whole, resumed = FakeRun(), FakeRun()
    state = make_state(-1)
    for record in make_state(7).history:
        state.add(record, {})
        WandbRounds(run=whole).on_round_end(state, record)
    WandbRounds(run=resumed).on_rounds_start(make_state(7), 9)
    assert resumed.logged == whole.logged


def test_a_resumed_run_is_not_sent_what_it_has(make_state: MakeState) -> None:
    run = FakeRun(step=7)
    WandbRounds(run=run).on_rounds_start(make_state(7), 9)
    assert run.logged == []


def test_recipes_are_one_table() -> None:
    run = FakeRun()
    WandbRounds(run=run).log_hyperparameters([ROW, {**ROW, "kind": "eta", "value": -0.1}])
    ((_, values),) = run.logged
    table = values["hyperparameters"]
    assert table.columns == ["client", "domain", "pool", "kind", "layer", "value"]
    assert table.data == [["a", "x", "seen", "beta", "bn1", 0.5], ["a", "x", "seen", "eta", "bn1", -0.1]]


def test_results_go_to_the_summary_without_what_is_missing() -> None:
    run = FakeRun()
    WandbRounds(run=run).log_results(RESULTS)
    WandbRounds(run=run).log_results({})
    assert run.summary == {"fedl2p/seen/accuracy": 0.9, "fedl2p/unseen/accuracy": 0.8}


def test_a_real_run_works_without_a_network_and_stays_in_its_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make_state: MakeState,
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"a name was looked up: {arguments}")

    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run = start_wandb(project="p", name="n", directory=tmp_path / "run", config={"a": 1}, mode="offline")
    try:
        callback = WandbRounds(run=run)
        callback.on_rounds_start(make_state(3), 4)
        assert run.step == 3
        callback.log_hyperparameters([ROW])
        callback.log_results(RESULTS)
        assert run.offline
        assert run.config["a"] == 1
        assert run.summary["best_round"] == 3
        assert run.summary["fedl2p/unseen/accuracy"] == 0.8
    finally:
        run.finish()
    written = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert f"run-{run.id}.wandb" in written
    (table,) = (tmp_path / "run").rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [["a", "x", "seen", "beta", "bn1", 0.5]]
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["wandb"]
    assert list(here.iterdir()) == []
    assert [path for path in home.rglob("*") if path.is_file()] == []
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("login", "wanted", "mode"),
    [
        (None, None, "offline"),
        ("environment", None, "online"),
        ("netrc", None, "online"),
        ("environment", "offline", "offline"),
        (None, "disabled", "disabled"),
    ],
)
def test_the_mode_follows_the_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: str | None, wanted: str | None, mode: str
) -> None:
    import wandb

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"a name was looked up: {arguments}")

    started: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    key = "0123456789" * 4
    if login == "environment":
        os.environ["WANDB_API_KEY"] = key
    if login == "netrc":
        netrc = Path(os.environ["NETRC"])
        netrc.write_text(f"machine wandb.example.org\n  login user\n  password {key}\n")
        netrc.chmod(0o600)
        os.environ["WANDB_BASE_URL"] = "https://wandb.example.org"
    if wanted:
        os.environ["WANDB_MODE"] = wanted
    wandb.teardown()  # forgets the settings that an earlier test made it read
    try:
        start_wandb(project="p", name="n", directory=tmp_path / "run", config={})
        start_wandb(project="p", name="n", directory=tmp_path / "run", config={}, mode="offline")
    finally:
        wandb.teardown()
    assert [options["mode"] for options in started] == [mode, "offline"]
    assert {options["reinit"] for options in started} == {"create_new"}


def test_folders_follow_the_run_unless_the_user_has_placed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: None)
    os.environ["WANDB_CACHE_DIR"] = "/mine"
    for name in ("first", "second"):
        start_wandb(project="p", name="n", directory=tmp_path / name, config={}, mode="offline")
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / name / "wandb" / "data")
    assert os.environ["WANDB_CACHE_DIR"] == "/mine"
