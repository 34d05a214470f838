"""From the configuration to objects, without running anything."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import fedl2p
from fedl2p.core.hypergradients import FOMAML, IFT, Unrolled
from fedl2p.datamodules import DigitsDataModule
from fedl2p.datamodules.base.federated import FederatedDataModule
from fedl2p.errors import ConfigError, DataError
from fedl2p.experiment.build import (
    build_data,
    build_estimator,
    build_fabric,
    build_model,
    build_runtime,
    call,
    check_model,
    check_trainer,
    import_object,
    instantiate,
    trainer_notice,
)
from fedl2p.experiment.config import load_config
from fedl2p.experiment.schema import ComponentConfig, Config
from fedl2p.models import SmallConvNet

DIGITS = str(Path(fedl2p.__file__).parents[1] / "configs" / "digits.yaml")
TINY = [
    "data.init_args.seen_clients=6",
    "data.init_args.unseen_clients=6",
    "data.init_args.pretrain_clients=2",
    "data.init_args.train_sizes=[8]",
    "model.init_args.widths=[4, 4, 4]",
]


def config(*overrides: str) -> Config:
    return load_config([DIGITS, *TINY, *overrides])


def test_classes_are_found_by_their_path() -> None:
    assert import_object("fedl2p.datamodules.DigitsDataModule", "data.class_path") is DigitsDataModule
    assert import_object("torch.nn.Linear", "model.class_path") is nn.Linear


@pytest.mark.parametrize("path", ["", "Digits", "nowhere.Digits", "fedl2p.datamodules.Nothing", "os.path.sep"])
def test_a_path_that_leads_to_no_class_or_function_names_its_key(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.class_path"):
        import_object(path, "data.class_path")


def test_an_abstract_class_is_refused() -> None:
    component = ComponentConfig("fedl2p.datamodules.base.federated.FederatedDataModule", {})
    with pytest.raises(ConfigError, match=r"data\.init_args: .*abstract"):
        instantiate(component, "data", kind=FederatedDataModule)


def test_a_function_that_makes_the_right_kind_will_do() -> None:
    component = ComponentConfig("torchvision.models.resnet18", {"num_classes": 7})
    assert instantiate(component, "model", kind=nn.Module).fc.out_features == 7
    with pytest.raises(ConfigError, match=r"model\.class_path is 'platform\.machine', which makes a str, not a Module"):
        instantiate(ComponentConfig("platform.machine"), "model", kind=nn.Module)


def test_call_names_unknown_and_missing_arguments() -> None:
    def make(*, size: int, shape: int = 1) -> int:
        return size * shape

    assert call(make, {"size": 2, "shape": 3}, "x") == 6
    with pytest.raises(ConfigError, match=r"Unknown key 'x\.siez'; known there are size, shape"):
        call(make, {"siez": 2}, "x")
    with pytest.raises(ConfigError, match=r"^x: .*'size'"):
        call(make, {}, "x")


def test_call_passes_any_argument_on_where_any_is_taken() -> None:
    assert call(lambda **options: options, {"a": 1}, "x") == {"a": 1}


def test_the_data_are_set_up_with_their_arguments() -> None:
    data = build_data(config("data.init_args.batch_size=5"))
    assert isinstance(data, DigitsDataModule)
    assert data.batch_size == 5
    assert [len(data.pool(pool)) for pool in ("pretrain", "seen", "unseen")] == [2, 6, 6]


def test_a_fraction_that_asks_for_less_than_one_client_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"federation\.client_fraction is 0\.05.*0\.167 or more"):
        build_data(config("federation.client_fraction=0.05"))


def test_pretraining_without_a_pool_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pretrain(self: DigitsDataModule) -> Any:
        return [client for client in original(self) if client.pool != "pretrain"]

    original = DigitsDataModule.build_clients
    monkeypatch.setattr(DigitsDataModule, "build_clients", no_pretrain)
    with pytest.raises(ConfigError, match=r"'pretrain'; give pretraining\.weights"):
        build_data(config())
    assert build_data(config("pretraining.rounds=0")).pool("pretrain") == ()


def test_an_error_of_the_data_is_one_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DigitsDataModule) -> Any:
        raise DataError("no disk")

    monkeypatch.setattr(DigitsDataModule, "build_clients", fail)
    with pytest.raises(ConfigError, match=r"data\.init_args: no disk"):
        build_data(config())


def test_the_model_s_weights_follow_from_the_seed() -> None:
    first, again, other = (build_model(config(f"seed={seed}")).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_a_model_whose_batch_norm_cannot_be_mixed_is_refused() -> None:
    settings = config()
    settings.model = ComponentConfig("torch.nn.BatchNorm2d", {"num_features": 3, "track_running_stats": False})
    with pytest.raises(ConfigError, match=r"^model: .*running statistics"):
        build_model(settings)


@pytest.mark.parametrize(
    ("overrides", "kind", "values"),
    [
        ([], Unrolled, {"steps": None}),
        (["hypergradient.init_args.steps=3"], Unrolled, {"steps": 3}),
        (["hypergradient.name=fomaml"], FOMAML, {}),
        (
            ["hypergradient.name=ift", "hypergradient.init_args={form: paper, neumann_terms: 2}"],
            IFT,
            {"form": "paper", "neumann_terms": 2},
        ),
    ],
    ids=["default", "steps", "fomaml", "ift"],
)
def test_estimators_are_built_by_name(overrides: list[str], kind: type, values: dict[str, Any]) -> None:
    estimator = build_estimator(config(*overrides))
    assert type(estimator) is kind
    assert {key: getattr(estimator, key) for key in values} == values


def test_keys_of_the_trainer_are_those_of_lightning() -> None:
    check_trainer(config("trainer.precision=64-true", "trainer.accelerator=cpu", "trainer.limit_train_batches=0.5"))
    with pytest.raises(ConfigError, match=r"'trainer\.max_epoch'"):
        check_trainer(config("trainer.max_epoch=3"))


def test_the_runtime_has_what_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(
        "seed=9",
        "client.finetune_epochs=2",
        "client.meta_iterations=4",
        "client.clip_value=0.5",
        "client.running_start=zero_one",
        "client.evaluation_statistics=batch",
        "client.meta_lr={bn_net: 0.1, lr_net: 0.2, base_lr: 0.3}",
        "federation.cohort_size=7",
        "meta_nets.initialization=paper",
        "meta_nets.log_divergence=false",
        "trainer.limit_train_batches=2",
    )
    runtime = build_runtime(settings, build_data(settings), SmallConvNet(widths=(4, 4, 4)), base_lr=0.07)
    learns = runtime.settings
    assert (learns.finetune_epochs, learns.meta_iterations, learns.clip_value) == (2, 4, 0.5)
    assert (learns.running_start, learns.evaluation_statistics) == ("zero_one", "batch")
    assert (runtime.cohort_size, runtime.seed) == (7, 9)
    assert vars(learns.meta_lr) == {"bn_net": 0.1, "lr_net": 0.2, "base_lr": 0.3}
    assert runtime.learner.settings is learns
    assert runtime.limits["train"] == 2 and runtime.trainer_arguments is None
    assert {len(episode.train_batches) for episode in runtime.meta_episodes(3, "meta", 1)} == {2}  # of one batch each
    assert runtime.meta_nets.base_lr.tolist() == pytest.approx([0.07] * 11)
    assert runtime.meta_nets.bn_net is not None
    assert not runtime.meta_nets.bn_net.log_inputs


def test_a_key_that_only_a_trainer_follows_gives_each_client_one_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Stop(Exception):
        pass

    def trainer(**arguments: Any) -> L.Trainer:
        made.append(arguments)
        raise Stop

    settings = config("trainer.limit_train_batches=2", "trainer.profiler=simple")
    runtime = build_runtime(settings, build_data(settings), SmallConvNet(widths=(4, 4, 4)), base_lr=0.07)
    monkeypatch.setattr("fedl2p.federation.runtime.L.Trainer", trainer)
    with pytest.raises(Stop):
        runtime.meta_update([runtime.lambda_()], [3], 1)
    assert made[0]["profiler"] == "simple"
    assert "limit_train_batches" not in made[0]  # the client gets episodes, whose batches are limited already
    notice = trainer_notice(settings)
    assert notice is not None and "\n" not in notice and "trainer.profiler" in notice
    assert trainer_notice(config("trainer.limit_train_batches=2", "trainer.precision=bf16-mixed")) is None


# A model that cannot work is found before anything is written


class _Once(torch.autograd.Function):
    """Doubles, with a gradient that has no derivative and no rule for vmap."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return 2 * inputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


class Doubling(SmallConvNet):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(_Once.apply(inputs))


class Wrong(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        raise TypeError("not today")


@pytest.mark.parametrize("name", ["unrolled", "ift", "fomaml"])
@pytest.mark.parametrize("cohort_size", ["auto", 1])
def test_a_model_that_can_be_learned_with_passes(name: str, cohort_size: str | int) -> None:
    chosen = config(f"hypergradient.name={name}", f"federation.cohort_size={cohort_size}")
    check_model(chosen, build_data(chosen), build_model(chosen))


def test_a_model_that_cannot_be_stacked_is_told_so() -> None:
    chosen = config()
    with pytest.raises(ConfigError, match=r"a hypergradient by 'unrolled' cannot pass it.*federation\.cohort_size=1"):
        check_model(chosen, build_data(chosen), Doubling(widths=[4, 4, 4]))


def test_a_model_that_raises_is_told_what_it_was_given() -> None:
    chosen = config()
    with pytest.raises(ConfigError, match=r"does not take inputs of shape \(1, 8, 8\): not today"):
        check_model(chosen, build_data(chosen), Wrong())


def test_a_model_of_other_classes_is_told_so() -> None:
    chosen = config()
    with pytest.raises(ConfigError, match=r"answers with the shape \(3,\); the data have 10 classes"):
        check_model(chosen, build_data(chosen), SmallConvNet(widths=[4, 4, 4], num_classes=3))


def test_several_devices_for_one_client_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.devices is 2; .*federation\.engine=ray"):
        check_trainer(config("trainer.accelerator=cpu", "trainer.devices=2"))
    check_trainer(config("trainer.accelerator=cpu", "trainer.devices=auto"))


# Where, and in which precision, cohorts run


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "cpu"),
        (["trainer.accelerator=cpu"], "cpu"),
        (["trainer.accelerator=cpu", "trainer.devices=1"], "cpu"),
        (["federation.cohort_size=1", "trainer.profiler=simple"], "cpu"),
    ],
)
def test_cohorts_run_where_a_trainer_would(overrides: list[str], expected: str) -> None:
    assert build_fabric(config(*overrides)).device == torch.device(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"trainer.*accelerator"):
        build_fabric(config("trainer.accelerator=gpu"))


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("32", None), ("32-true", None), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.bfloat16), ("64-true", None)],
)
def test_the_precision_of_cohorts(precision: str, expected: torch.dtype | None) -> None:
    with build_fabric(config(f"trainer.precision={precision}")).autocast():
        assert torch.is_autocast_enabled("cpu") == (expected is not None)
        assert expected is None or torch.get_autocast_dtype("cpu") == expected


def test_double_precision_is_that_of_the_model_the_nets_and_the_data() -> None:
    settings = config("trainer.precision=64-true")
    data, model = build_data(settings), build_model(settings)
    check_model(settings, data, model)
    runtime = build_runtime(settings, data, model, base_lr=0.1)
    assert {t.dtype for t in runtime.lambda_().values()} == {torch.float64}
    assert runtime.statistics(3).layer_moments.dtype == torch.float64
    assert runtime.evaluate([runtime.recipe(runtime.lambda_(), 3)], [3])[0]["val"].outputs.dtype == torch.float64
