"""The main job from end to end, tiny: what it leaves in its folder, that it repeats, and that it can be resumed."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fedl2p
from fedl2p.cli import main
from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.statistics import collect_statistics
from fedl2p.errors import FederationError
from fedl2p.experiment.build import build_data
from fedl2p.experiment.config import load_config, to_yaml
from fedl2p.experiment.context import prepare
from fedl2p.experiment.run import collect, run_stages
from fedl2p.experiment.schema import Config
from fedl2p.federation.checkpoint import load_state
from fedl2p.federation.state import MetaState, RoundCallback, RoundRecord
from fedl2p.io import load_tensors
from fedl2p.models import SmallConvNet
from fedl2p.policy import load_policy

# Lightning's own: small loaders, and a name that it still uses and torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*max_epochs. was not set"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]

DIGITS = str(Path(fedl2p.__file__).parents[1] / "configs" / "digits.yaml")
TINY = [
    "seed=3",
    "data.init_args.domains=[noise, blur]",
    "data.init_args.seen_clients=4",
    "data.init_args.unseen_clients=4",
    "data.init_args.pretrain_clients=2",
    "data.init_args.train_sizes=[8, 12]",
    "data.init_args.batch_size=6",
    "model.init_args.widths=[4, 4, 4]",
    "pretraining.rounds=1",
    "client.finetune_epochs=1",
    "federation.rounds=2",
    "baselines.rates=[0.1, 0.3]",
    "wandb.mode=disabled",
]
BOTH = ("auto_rgn", "ft_initial_beta", "mean_recipe", "fedl2p", "fedl2p_refined")
METHODS: dict[str, tuple[str, ...]] = {
    "global": ("seen", "unseen"),
    "ft_bn_c": ("seen", "unseen"),
    "ft_bn_c_batch": ("seen", "unseen"),
    "ft_bn_g": ("seen", "unseen"),
    "ft_bn_i": ("seen", "unseen"),
    "ft_bn_i_running": ("seen", "unseen"),
    "l2p": ("seen",),
    "initial_nets": ("seen", "unseen"),
    **dict.fromkeys(BOTH, ("seen", "unseen")),
    "fedl2p_shuffled": ("seen", "unseen"),
    "ft_refined": ("seen", "unseen"),
}
"""Of any run; in each, the methods in `BOTH` have a second row, with the batch-norm statistics that the run leaves."""


def methods_of(other: str) -> dict[str, tuple[str, ...]]:
    """All methods of a run whose second rows have these statistics."""
    return METHODS | {f"{name}_{other}": METHODS[name] for name in BOTH}


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went through, with wandb off; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    torch.manual_seed(99)
    assert main(["run", DIGITS, *TINY, f"output_dir={folder}"]) == 0
    return folder


# The folder


def test_the_folder_holds_every_file_of_the_design(finished: Path) -> None:
    for name in (
        "results.json",
        "metrics.jsonl",
        "hyperparameters.csv",
        "global_model.safetensors",
        "meta_nets.safetensors",
        "config.yaml",
        "report.html",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "checkpoints").iterdir())
    assert list((finished / "figures").iterdir())
    assert not [path for path in finished.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".")]


def test_results_have_every_method_and_pool_with_their_keys(finished: Path) -> None:
    results = results_of(finished)
    assert results["seed"] == 3
    assert results["config"]["federation"]["rounds"] == 2
    assert {"torch", "lightning", "flwr", "python"} <= set(results["versions"])
    assert {"pretraining", "tuning", "rounds", "l2p", "evaluation", "recommendation", "total"} <= set(
        results["timings"]
    )
    assert set(results["methods"]) == set(methods_of("running"))
    for name, pools in methods_of("running").items():
        method = results["methods"][name]
        assert {pool for pool in ("seen", "unseen") if pool in method} == set(pools)
        for pool in pools:
            clients = method[pool]["clients"]
            assert len(clients) == 4
            assert all(client.startswith(pool) for client in clients)
            accuracies = [row["accuracy"] for row in clients.values()]
            assert method[pool]["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 4)
            assert all(0 <= accuracy <= 1 for accuracy in accuracies)
            assert math.isfinite(method[pool]["loss"]["mean"])
            assert all(row["count"] >= 8 for row in clients.values())


def test_results_have_the_chosen_rates_and_what_was_tried(finished: Path) -> None:
    methods = results_of(finished)["methods"]
    for name in ("ft_bn_c", "ft_bn_g", "ft_bn_i"):
        settings = methods[name]["settings"]
        rates, losses = zip(*settings["grid"], strict=True)
        assert {0.1, 0.3} <= set(rates)
        assert min(rates) < settings["rate"] < max(rates)
        assert settings["val_loss"] == min(loss for loss in losses if loss is not None)
    tuned = [methods[name]["settings"] for name in ("ft_bn_c", "ft_bn_g", "ft_bn_i")]
    best = min(tuned, key=lambda settings: settings["val_loss"])
    assert methods["fedl2p"]["settings"]["base_lr"] == best["rate"]


def test_l2p_has_the_iterations_of_a_client_of_fedl2p_on_average(finished: Path) -> None:
    # Two rounds of half of the clients: each takes part once, with one iteration.
    assert results_of(finished)["methods"]["l2p"]["settings"]["meta_iterations"] == 1


def test_metrics_have_a_line_a_round_that_agrees_with_the_results(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    rounds = results_of(finished)["rounds"]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [line["val_loss"] for line in lines] == rounds["val_losses"]
    assert rounds["best_val_loss"] == min(rounds["val_losses"])
    assert rounds["val_losses"][rounds["best"]] == rounds["best_val_loss"]
    assert [len(line["clients"]) for line in lines] == [0, 2, 2]


def test_hyperparameters_have_a_row_for_every_client_and_layer(finished: Path) -> None:
    with (finished / "hyperparameters.csv").open() as file:
        rows = list(csv.DictReader(file))
    clients = {row["client"] for row in rows}
    assert len(clients) == 8
    assert {row["pool"] for row in rows} == {"seen", "unseen"}
    assert {row["domain"] for row in rows} == {"noise", "blur"}
    # SmallConvNet has 3 batch norms, and 3 * 3 + 2 parameter tensors.
    assert len(rows) == 8 * (3 + 11)
    assert all(0 <= float(row["value"]) <= 1 for row in rows if row["kind"] == "beta")


def test_the_saved_policy_and_model_give_the_values_of_the_table(finished: Path) -> None:
    data = build_data(load_config([DIGITS, *TINY]))
    model = SmallConvNet(widths=(4, 4, 4), momentum=0.5)
    model.load_state_dict(load_tensors(finished / "global_model.safetensors"))
    converted = convert_batchnorm(model)
    nets = load_policy(finished / "meta_nets.safetensors", converted)
    with (finished / "hyperparameters.csv").open() as file:
        rows = {(row["client"], row["kind"], row["layer"]): float(row["value"]) for row in csv.DictReader(file)}
    checked = 0
    for client_id in (data.pool("seen")[1], data.pool("unseen")[2]):
        loader = data.client(client_id).statistics_dataloader()
        recipe = nets.recipe(collect_statistics(converted, loader))
        for kind, names in (("beta", nets.batchnorm_names), ("eta", nets.parameter_names)):
            for name, value in zip(names, getattr(recipe, kind).tolist(), strict=True):
                expected = rows[data.clients[client_id].name, kind, name]
                assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
                checked += 1
    assert checked == 2 * 14


def test_the_policy_is_the_lambda_of_the_best_round(finished: Path) -> None:
    state = load_state(finished / "checkpoints")
    assert state is not None
    tensors = load_tensors(finished / "meta_nets.safetensors")
    assert all(torch.equal(tensors[name], t) for name, t in state.best_lambda.items())


def test_the_written_configuration_runs_the_same_again(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    torch.manual_seed(100)  # not what the first run began with
    assert main(["run", str(finished / "config.yaml"), f"output_dir={folder}"]) == 0
    first, again = results_of(finished), results_of(folder)
    assert again["methods"] == first["methods"]
    assert again["comparisons"] == first["comparisons"]
    assert again["rounds"] == first["rounds"]
    assert (folder / "hyperparameters.csv").read_bytes() == (finished / "hyperparameters.csv").read_bytes()
    for name in ("global_model.safetensors", "meta_nets.safetensors"):
        now, then = load_tensors(folder / name), load_tensors(finished / name)
        assert all(torch.equal(now[key], tensor) for key, tensor in then.items())


@pytest.mark.slow
def test_another_seed_gives_other_numbers(finished: Path, tmp_path: Path) -> None:
    arguments = ["run", DIGITS, *TINY, "seed=4", "baselines.l2p=false", "baselines.shuffled=false"]
    assert main([*arguments, f"output_dir={tmp_path / 'run'}"]) == 0
    results = results_of(tmp_path / "run")
    assert results["rounds"]["val_losses"] != results_of(finished)["rounds"]["val_losses"]
    assert set(results["methods"]) == set(methods_of("running")) - {"l2p", "fedl2p_shuffled"}


def test_the_shuffled_ablation_is_the_mean_of_several_shuffles_of_the_same_clients(finished: Path) -> None:
    methods = results_of(finished)["methods"]
    assert methods["fedl2p_shuffled"]["settings"] == {"shuffles": 5}
    for pool in ("seen", "unseen"):
        own, shuffled = methods["fedl2p"][pool]["clients"], methods["fedl2p_shuffled"][pool]["clients"]
        assert list(own) == list(shuffled)
        assert all(own[name]["count"] == shuffled[name]["count"] for name in own)
        assert any(own[name]["loss"] != shuffled[name]["loss"] for name in own)


def test_the_cohort_sizes_that_were_chosen_are_recorded(finished: Path) -> None:
    assert results_of(finished)["cohort_sizes"] == {"6": 64}


# Resuming


class StopAfter(RoundCallback):
    """An interruption."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_round_end(self, state: MetaState, record: RoundRecord) -> None:
        if record.round == self.number:
            raise KeyboardInterrupt


def compared(config: Config, *callbacks: RoundCallback, resume: bool = False) -> dict[str, Any]:
    """The numbers of a run, of which only the stages are run."""
    context = prepare(config, resume=resume)
    with context.folder.opened(to_yaml(config), resume=resume):
        results = collect(context, run_stages(context, callbacks))
    return {key: results[key] for key in ("methods", "comparisons", "rounds")}


def test_a_run_that_was_stopped_in_its_rounds_ends_with_the_same_results(finished: Path, tmp_path: Path) -> None:
    config = load_config([DIGITS, *TINY, f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(KeyboardInterrupt):
        compared(config, StopAfter(1))
    assert not (tmp_path / "run" / "meta_nets.safetensors").exists()
    assert main(["run", DIGITS, *TINY, f"output_dir={tmp_path / 'run'}", "--resume"]) == 0
    resumed, whole = results_of(tmp_path / "run"), results_of(finished)
    for key in ("methods", "comparisons", "rounds"):
        assert resumed[key] == whole[key]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "lost",
    [
        ["checkpoints/l2p.safetensors"],
        ["checkpoints/l2p.safetensors", "checkpoints/rounds.safetensors", "meta_nets.safetensors"],
        [
            "checkpoints/l2p.safetensors",
            "checkpoints/rounds.safetensors",
            "checkpoints/tuning.json",
            "global_model.safetensors",
        ],
        [],
    ],
    ids=["in L2P", "in tuning", "in pretraining", "at the end"],
)
def test_a_run_that_was_stopped_elsewhere_ends_with_the_same_results(
    finished: Path, tmp_path: Path, lost: list[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "config.yaml").write_text(
        (finished / "config.yaml").read_text().replace(f"output_dir: {finished}", f"output_dir: {folder}")
    )
    for name in ("results.json", *lost):
        (folder / name).unlink()
    config = load_config([str(folder / "config.yaml")])
    resumed = json.loads(json.dumps(compared(config, resume=True)))
    whole = results_of(finished)
    assert resumed == {key: whole[key] for key in resumed}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resuming_with_another_configuration_is_refused_and_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(finished)
    assert main(["run", DIGITS, *TINY, f"output_dir={finished}", "federation.rounds=1", "--resume"]) == 2
    assert "'rounds: 2' there, 'rounds: 1' now" in capsys.readouterr().err
    assert files(finished) == before


def test_a_refused_resume_leaves_no_wandb_run_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("fedl2p.experiment.run._tracker", lambda *args: started.append(args))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 77\n")
    assert main(["run", DIGITS, *TINY, f"output_dir={folder}", "--resume"]) == 2
    assert started == []


# What else can be configured


def run_mine(path: str, folder: Path, *overrides: str) -> dict[str, Any]:
    assert main(["run", path, f"output_dir={folder}", *overrides]) == 0
    return results_of(folder)


def test_a_user_s_own_data_and_model_run_and_the_terminal_shows_the_table_and_the_folder(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_mine(mine, tmp_path / "run")
    out = capsys.readouterr().out
    assert all(word in out for word in ("FedL2P", "FT (BN C)", "FT (BN G)", "FT (BN I)", "L2P", "seen", "unseen"))
    assert out.splitlines()[-1] == str(tmp_path / "run")
    assert set(results["methods"]) == set(methods_of("batch"))
    for name, pools in methods_of("batch").items():
        for pool in pools:
            names = {"seen": {"m0", "m1", "m2"}, "unseen": {"m3", "m4"}}[pool]
            assert set(results["methods"][name][pool]["clients"]) == names


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.init_args.batchnorm=false"],
        ["federation.cohort_size=1"],
        ["federation.rounds=0"],
        ["client.evaluation_statistics=batch"],
        ["data.init_args.clients=1", "data.init_args.unseen=1", "federation.client_fraction=1"],
        ["client.validation_loss=expected_error", "meta_nets.sample_count=true"],
        pytest.param(["hypergradient.name=ift", "hypergradient.init_args.form=paper"], marks=pytest.mark.slow),
        pytest.param(
            ["meta_nets.base_lr=0.05", "meta_nets.standardize=false", "meta_nets.initialization=paper"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda overrides: overrides[0],
)
def test_other_settings_run_to_the_end(mine: str, tmp_path: Path, overrides: list[str]) -> None:
    results = run_mine(mine, tmp_path / "run", *overrides)
    assert math.isfinite(results["methods"]["fedl2p"]["unseen"]["accuracy"]["mean"])


def test_a_federation_without_unseen_clients_reports_seen_ones_only(mine: str, tmp_path: Path) -> None:
    methods = run_mine(mine, tmp_path / "run", "data.init_args.unseen=0")["methods"]
    assert all("seen" in method and "unseen" not in method for method in methods.values())


def test_a_client_fraction_and_a_patience_reach_the_rounds(mine: str, tmp_path: Path) -> None:
    overrides = ["federation.rounds=30", "federation.patience=1", "federation.client_fraction=1"]
    # Rates of 0 change nothing, so no round is better than the start.
    frozen = [f"client.meta_lr.{part}=0" for part in ("bn_net", "lr_net", "base_lr")]
    rounds = run_mine(mine, tmp_path / "run", *overrides, *frozen)["rounds"]
    assert (rounds["last"], rounds["best"]) == (1, 0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["clients"] == ["m0", "m1", "m2"]


def test_weights_from_a_file_are_the_global_model(mine: str, finished: Path, tmp_path: Path) -> None:
    weights = finished / "global_model.safetensors"
    arguments = ["run", DIGITS, *TINY, "pretraining.rounds=0", f"pretraining.weights={weights}", "federation.rounds=0"]
    assert main([*arguments, f"output_dir={tmp_path / 'run'}"]) == 0
    assert results_of(tmp_path / "run")["methods"]["global"] == results_of(finished)["methods"]["global"]


def test_weights_of_another_model_are_refused_with_nothing_written(
    mine: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = finished / "global_model.safetensors"
    assert main(["run", mine, f"output_dir={tmp_path / 'run'}", f"pretraining.weights={weights}"]) == 2
    assert "pretraining.weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_double_precision_of_the_trainer_runs_to_the_end(mine: str, tmp_path: Path) -> None:
    run_mine(mine, tmp_path / "run", "trainer.precision=64-true", "federation.cohort_size=1")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["methods"]["fedl2p"]["seen"]["accuracy"]["mean"] <= 1
    assert results["cohort_sizes"] == 1  # as configured, whatever would be chosen


def test_a_run_that_cannot_go_on_ends_with_code_1_and_the_reason(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise FederationError("Round 1: 0 of 2 clients gave a usable answer")

    monkeypatch.setattr("fedl2p.experiment.stages.run_rounds", fail)
    assert main(["run", mine, f"output_dir={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "fedl2p: Round 1: 0 of 2 clients gave a usable answer"


@pytest.mark.slow
def test_wandb_gets_the_run_offline(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    run_mine(mine, tmp_path / "run", "wandb.mode=offline")
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert list(runs[0].glob("*.wandb"))
