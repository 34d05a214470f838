"""The controls of a run: what stands in its table, on which recipes they are, and what is recommended."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fedl2p.experiment.recommendation as recommendation_module
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import RefinementSettings
from fedl2p.errors import DataError
from fedl2p.experiment.build import build_runtime
from fedl2p.experiment.config import load_config
from fedl2p.experiment.context import RunContext, prepare
from fedl2p.experiment.evaluation import evaluations, hypergradients, on_test_data
from fedl2p.experiment.methods import FINE_TUNING, TunedRate
from fedl2p.experiment.recommendation import half, recommendation
from fedl2p.experiment.run import run
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.federation.state import MetaState

GIVEN = ["baselines.tune=false", "meta_nets.base_lr=0.1"]
RATES = "baselines.tuned_rates={ft_bn_c: 0.1, ft_bn_g: 0.1, ft_bn_i: 0.1, auto_rgn: 0.1}"


@pytest.fixture
def context(mine: str, tmp_path: Path) -> RunContext:
    return prepare(load_config([mine, "data.init_args.unseen=3", f"output_dir={tmp_path / 'run'}"]))


@pytest.fixture
def runtime(context: RunContext) -> ClientRuntime:
    return build_runtime(context.config, context.data, context.model, base_lr=0.1)


def clients(results: dict[str, Any], method: str, pool: str = "unseen") -> dict[str, Any]:
    found: dict[str, Any] = results["methods"][method][pool]["clients"]
    return found


def test_the_mean_recipe_of_a_run_is_the_mean_over_the_seen_clients_rows(mine: str, tmp_path: Path) -> None:
    results = run(mine, f"output_dir={tmp_path / 'run'}", quiet=True)
    with (tmp_path / "run" / "hyperparameters.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["pool"] == "seen"]
    settings = results["methods"]["mean_recipe"]["settings"]
    assert settings["recipes"] == len({row["client"] for row in rows}) == 3
    for kind in ("beta", "eta"):
        layers = list(dict.fromkeys(row["layer"] for row in rows if row["kind"] == kind))
        own = [[float(r["value"]) for r in rows if r["kind"] == kind and r["layer"] == layer] for layer in layers]
        assert settings[kind] == pytest.approx([sum(values) / 3 for values in own], rel=1e-5)


def test_at_equal_rates_the_second_rows_are_the_other_fine_tuning(mine: str, tmp_path: Path) -> None:
    results = run(mine, *GIVEN, RATES, f"output_dir={tmp_path / 'run'}", quiet=True)
    assert clients(results, "ft_bn_c_batch") == clients(results, "ft_bn_i")
    assert clients(results, "ft_bn_i_running") == clients(results, "ft_bn_c")
    assert clients(results, "ft_bn_c") != clients(results, "ft_bn_i")


def test_with_nets_that_do_not_learn_all_recipes_are_those_of_round_0(mine: str, tmp_path: Path) -> None:
    frozen = [f"client.meta_lr.{part}=0" for part in ("bn_net", "lr_net", "base_lr")]
    start = ["meta_nets.initial_beta=1", "meta_nets.initialization=paper"]
    results = run(mine, *GIVEN, RATES, *frozen, *start, f"output_dir={tmp_path / 'run'}", quiet=True)
    assert clients(results, "initial_nets") == clients(results, "fedl2p")
    assert clients(results, "ft_initial_beta") == clients(results, "ft_bn_c")
    assert results["methods"]["ft_initial_beta"]["settings"] == {"beta": 1.0, "rate": 0.1}
    assert results["methods"]["ft_initial_beta"]["label"] == "FT (beta 1)"


def test_keys_leave_methods_out_and_the_bound_is_compared_with_nothing(mine: str, tmp_path: Path) -> None:
    off = ["baselines.auto_rgn=false", "baselines.refined=false", "baselines.l2p=false", "baselines.shuffled=false"]
    without = run(mine, *off, "refinement.steps=0", f"output_dir={tmp_path / 'without'}", quiet=True)
    assert not [name for name in without["methods"] if "refined" in name or "rgn" in name or "oracle" in name]
    assert without["recommended"] is None
    bound = run(mine, *off, "baselines.oracle=true", f"output_dir={tmp_path / 'bound'}", quiet=True)
    assert set(bound["methods"]) - set(without["methods"]) == {"fedl2p_refined", "fedl2p_refined_batch", "oracle"}
    assert bound["methods"]["oracle"]["label"].startswith("Bound")
    assert not [row for row in bound["comparisons"] if "oracle" in (row["a"], row["b"])]
    assert clients(bound, "mean_recipe") == clients(without, "mean_recipe")
    assert bound["recommended"]["method"] in bound["methods"]


def test_the_bound_has_the_lower_test_loss_since_it_saw_the_test_data(mine: str, tmp_path: Path) -> None:
    results = run(mine, "baselines.oracle=true", f"output_dir={tmp_path / 'run'}", quiet=True)
    for name, row in clients(results, "oracle").items():
        assert row["loss"] <= clients(results, "mean_recipe")[name]["loss"] + 1e-6


def test_a_model_without_batch_norm_has_no_second_rows(mine: str, tmp_path: Path) -> None:
    results = run(mine, "model.init_args.batchnorm=false", f"output_dir={tmp_path / 'run'}", quiet=True)
    assert not [name for name in results["methods"] if name.endswith(("_batch", "_running"))]
    assert "fedl2p_refined" in results["methods"]


def test_every_test_is_counted_beforehand(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []
    measure = ClientRuntime.evaluate

    def counted(self: ClientRuntime, recipes: Any, client_ids: Any, **options: Any) -> Any:
        if options.get("parts") == ("test",):
            measured.append(str(client_ids))
        return measure(self, recipes, client_ids, **options)

    monkeypatch.setattr(ClientRuntime, "evaluate", counted)
    arguments = [mine, "baselines.oracle=true", f"output_dir={tmp_path / 'run'}", "baselines.l2p=false"]
    config = load_config(arguments)  # type: ignore[arg-type]  # a list of strings
    run(*arguments)
    assert evaluations(config) == len(measured) / 2  # of two pools
    assert hypergradients(config) == 2 * 4 + 11
    assert "Testing all methods (19 hypergradients a client)" in capsys.readouterr().err


# What refines, and what is recommended


def test_the_runtime_refines_each_client_on_its_own_validation_data(
    context: RunContext, runtime: ClientRuntime
) -> None:
    ids = [*context.data.pool("unseen"), context.data.pool("seen")[0]]
    recipes = [runtime.recipe(runtime.lambda_(), i) for i in ids]
    settings = RefinementSettings(steps=2)
    together = runtime.refine(recipes, ids, settings)
    for client_id, recipe, found in zip(ids, recipes, together, strict=True):
        episode = runtime.personal_episode(client_id, ("val",))
        (alone,) = runtime.learner.refine([episode], [recipe], settings)
        torch.testing.assert_close(found.hyperparameters.eta, alone.hyperparameters.eta, rtol=1e-4, atol=1e-6)
        measured = runtime.evaluate([found.hyperparameters], [client_id])[0]["val"].val_loss
        assert measured == pytest.approx(float(found.val_losses.min()), rel=1e-4)
    (on_test,) = runtime.refine(recipes[:1], ids[:1], settings, parts=("test",), view=on_test_data)
    test_loss = runtime.evaluate(recipes[:1], ids[:1], parts=("test",))[0]["test"].val_loss
    assert float(on_test.val_losses[0]) == pytest.approx(test_loss, rel=1e-4)
    with pytest.raises(DataError, match="no val data"):
        runtime.refine(recipes[:1], ids[:1], settings, parts=("test",))


def test_the_halves_share_no_sample_and_make_the_whole(context: RunContext, runtime: ClientRuntime) -> None:
    episode = runtime.personal_episode(context.data.pool("seen")[0], ("val",))
    whole = torch.cat([inputs for inputs, _ in episode.val_batches])
    parts = [half(episode, number).val_batches[0] for number in (0, 1)]
    assert [len(inputs) for inputs, _ in parts] == [2, 2]
    assert all(inputs.is_contiguous() for inputs, _ in parts)
    assert torch.equal(torch.stack([parts[0][0], parts[1][0]], 1).flatten(0, 1), whole)


RATES_OF = {name: TunedRate(0.1, loss) for name, loss in zip(FINE_TUNING, (0.5, 0.7, 0.1), strict=True)}


def state_of(runtime: ClientRuntime) -> MetaState:
    lambda_ = runtime.lambda_()
    return MetaState(lambda_=lambda_, best_lambda=lambda_)


def test_the_recommended_method_has_the_lowest_loss_on_the_halves_that_were_held_out(
    context: RunContext, runtime: ClientRuntime
) -> None:
    advice = recommendation(context, runtime, RATES_OF, state_of(runtime))
    assert advice is not None
    losses = advice["val_losses"]
    assert list(losses) == ["ft_bn_c", "mean_recipe", "fedl2p", "fedl2p_refined"]  # ft_bn_i has other statistics
    assert losses[advice["method"]] == min(losses.values())
    # One of them by hand: client by client and half by half, weighted by training samples.
    total, weight = 0.0, 0
    for client_id in context.data.pool("seen"):
        recipe = runtime.recipe(state_of(runtime).best_lambda, client_id)
        samples = context.data.client_sizes(client_id)[0]
        for number in (0, 1):
            measured = runtime.evaluate([recipe], [client_id], view=lambda e, n=number: half(e, n))  # type: ignore[misc]
            total += samples * measured[0]["val"].val_loss / 2
        weight += samples
    assert losses["fedl2p"] == pytest.approx(total / weight, rel=1e-5)


def test_no_test_data_are_looked_at_for_the_recommendation(
    context: RunContext, runtime: ClientRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_validation(self: ClientRuntime, client_id: int, parts: Any) -> Any:
        assert "test" not in parts
        return asked(self, client_id, parts)

    asked = ClientRuntime.personal_episode
    monkeypatch.setattr(ClientRuntime, "personal_episode", only_validation)
    assert recommendation(context, runtime, RATES_OF, state_of(runtime)) is not None


def test_a_refined_recipe_is_measured_on_the_half_that_it_was_not_refined_on(
    context: RunContext, runtime: ClientRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {"refine": [], "evaluate": []}

    def noting(name: str) -> None:
        method = getattr(ClientRuntime, name)

        def noted(
            self: ClientRuntime, recipes: list[Hyperparameters], ids: list[int], *rest: Any, **options: Any
        ) -> Any:
            episode = options["view"](self.personal_episode(ids[0], ("val",)))
            seen[name].append(episode.val_batches[0][0])
            return method(self, recipes, ids, *rest, **options)

        monkeypatch.setattr(ClientRuntime, name, noted)

    noting("refine")
    noting("evaluate")
    recommendation(context, runtime, RATES_OF, state_of(runtime))
    assert len(seen["refine"]) == 2 and len(seen["evaluate"]) == 8
    for refined, measured in zip(seen["refine"], (seen["evaluate"][3], seen["evaluate"][7]), strict=True):
        assert not torch.isin(measured, refined).any()


def test_too_few_validation_samples_give_no_recommendation(
    context: RunContext, runtime: ClientRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommendation_module, "FEWEST", 5)
    assert recommendation(context, runtime, RATES_OF, state_of(runtime)) is None


def test_results_with_the_controls_are_plain_json(mine: str, tmp_path: Path) -> None:
    results = run(mine, "baselines.oracle=true", f"output_dir={tmp_path / 'run'}", quiet=True)
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["recommended"] == results["recommended"]
    assert all(math.isfinite(loss) for loss in written["recommended"]["val_losses"].values())
