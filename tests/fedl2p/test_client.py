"""`FedL2PClient` in a plain Lightning Trainer, against the same work done by hand with the pure functions."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from client_cases import quiet_trainer as make_trainer
from core_cases import close
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedl2p.client import FedL2PClient
from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.episode import Episode, gather_batches, make_episode
from fedl2p.core.finetune import evaluate, finetune, initial_running
from fedl2p.core.functional import Batch, FunctionalModel, InnerState
from fedl2p.core.hypergradients import Hypergradient, HypergradientEstimator, Unrolled
from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.meta_step import meta_step
from fedl2p.core.statistics import ClientStatistics, collect_statistics
from fedl2p.datamodules.base.federated import ClientData, ClientDataModule
from fedl2p.errors import ConfigError, DataError, ModelError
from fedl2p.experiment.methods import FixedRecipe

# Lightning's own: small loaders, and a name that it still uses and torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

RATES = {"bn_net": 0.05, "lr_net": 0.02, "base_lr": 0.01}


def blobs(count: int, seed: int) -> TensorDataset:
    """`count` shifted points in 4 dimensions, 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        1 + 2 * torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)
    )


class Plain(L.LightningDataModule):
    """A user's own: no statistics_dataloader, fixed order, and each set is made in the stage that it is for."""

    def __init__(self, train: int = 12, val: int = 7, test: int = 10, batch_size: int = 6) -> None:
        super().__init__()
        self.sizes = {"train": train, "val": val, "test": test}
        self.batch_size = batch_size
        self.sets: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        made = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        for seed, name in enumerate(("train", "val", "test")):
            if name in made:
                self.sets[name] = blobs(self.sizes[name], seed)

    def loader(self, name: str) -> DataLoader[Any]:
        return DataLoader(self.sets[name], batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader("test")

    def batches(self, name: str) -> list[Batch]:
        """What the loader of `name` gives, made without a Trainer."""
        self.setup("test" if name == "test" else "fit")
        return [(x, y) for x, y in self.loader(name)]


class Spy(HypergradientEstimator):
    """`Unrolled`, which keeps the sizes of what it looked at, and may spoil some of its answers."""

    def __init__(self, spoil: Callable[[int], bool] = lambda call: False) -> None:
        self.inner = Unrolled()
        self.spoil = spoil
        self.train: list[list[int]] = []
        self.val: list[list[int]] = []

    def history(self, num_steps: int) -> int:
        return self.inner.history(num_steps)

    def __call__(self, model: FunctionalModel, episode: Episode, *args: Any, **options: Any) -> Hypergradient:
        call = len(self.train)
        self.train.append([len(y) for _, y in episode.train_batches])
        self.val.append([len(y) for _, y in episode.val_batches])
        estimate = self.inner(model, episode, *args, **options)
        return estimate._replace(beta=estimate.beta * torch.nan) if self.spoil(call) else estimate


def network(batchnorm: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        middle: list[nn.Module] = [nn.BatchNorm1d(5)] if batchnorm else []
        return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3))


def make_client(model: nn.Module | None = None, **options: Any) -> FedL2PClient:
    torch.manual_seed(4)
    settings: dict[str, Any] = {"base_lr": 0.1, "meta_iterations": 3, "finetune_epochs": 2, "meta_lr": RATES}
    return FedL2PClient(network() if model is None else model, num_classes=3, **(settings | options))


def lambda_of(nets: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in nets.named_parameters()}


def start_of(model: FunctionalModel, statistics: ClientStatistics) -> InnerState:
    parameters, buffers = model.tensors()
    return InnerState(parameters, {**buffers, **initial_running(model, buffers, statistics)})


def learn_by_hand(
    nets: MetaNets, data: Plain, *, iterations: int, epochs: int
) -> tuple[dict[str, Tensor], list[float]]:
    """K meta iterations as the paper has them: meta_step, then SGD with a rate for each part of lambda."""
    model = FunctionalModel.of(convert_batchnorm(network()))
    train, val = data.batches("train"), data.batches("val")
    statistics = collect_statistics(model.module, train)
    episode = make_episode(model, statistics, train * epochs, val)
    lambda_, losses = lambda_of(nets), []
    for _ in range(iterations):
        step = meta_step(model, nets, Unrolled(), InnerState(*model.tensors()), lambda_, episode)
        lambda_ = {name: p - RATES[name.split(".")[0]] * step.gradients[name] for name, p in lambda_.items()}
        losses.append(float(step.val_loss))
    return lambda_, losses


def personalize_by_hand(client: FedL2PClient, data: Plain) -> tuple[FunctionalModel, InnerState, Tensor]:
    """Statistics of the training data, recipe, fine-tuning."""
    model = FunctionalModel.of(convert_batchnorm(network()))
    train = data.batches("train")
    statistics = collect_statistics(model.module, train)
    beta, eta = client.meta_nets.recipe(statistics)
    batches = train * client.settings.finetune_epochs
    return model, finetune(model, start_of(model, statistics), batches, beta, eta).final, beta


# How many meta iterations


@pytest.mark.parametrize(
    ("train", "iterations"), [(6, 4), (12, 3), (60, 3)], ids=["one batch", "two batches", "ten batches"]
)
def test_fit_runs_exactly_k_meta_iterations_and_returns_the_epochs(tmp_path: Path, train: int, iterations: int) -> None:
    estimator = Spy()
    client = make_client(meta_iterations=iterations, estimator=estimator)
    trainer = make_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(client, datamodule=Plain(train=train))
    assert len(estimator.train) == len(client.val_losses) == iterations
    assert trainer.global_step == iterations
    assert trainer.max_epochs == 1


def test_a_second_fit_runs_k_iterations_again(tmp_path: Path) -> None:
    estimator, data = Spy(), Plain()
    client = make_client(estimator=estimator)
    for _ in range(2):
        make_trainer(tmp_path).fit(client, datamodule=data)
    assert len(estimator.train) == 6
    assert len(client.val_losses) == 3


def test_the_trainer_has_its_epochs_back_after_a_failed_fit(tmp_path: Path) -> None:
    class Failing(Spy):
        def __call__(self, *args: Any, **options: Any) -> Hypergradient:
            raise ArithmeticError("no")

    trainer = make_trainer(tmp_path, max_epochs=7)
    with pytest.raises(ArithmeticError):
        trainer.fit(make_client(estimator=Failing()), datamodule=Plain())
    assert trainer.max_epochs == 7


def test_fast_dev_run_is_one_iteration_over_one_batch_an_epoch(tmp_path: Path) -> None:
    estimator = Spy()
    client = make_client(estimator=estimator)
    trainer = make_trainer(tmp_path, fast_dev_run=True)
    trainer.fit(client, datamodule=Plain())
    assert estimator.train == [[6, 6]]
    assert estimator.val == [[6]]
    assert trainer.max_epochs == 1


# What is learned


def test_fit_gives_the_lambda_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    client, data = make_client(), Plain()
    expected, losses = learn_by_hand(client.meta_nets, data, iterations=3, epochs=2)
    start = lambda_of(client.meta_nets)
    make_trainer(tmp_path).fit(client, datamodule=data)
    learned = lambda_of(client.meta_nets)
    assert any(not torch.equal(learned[name], start[name]) for name in start)
    for name, tensor in expected.items():
        torch.testing.assert_close(learned[name], tensor, rtol=0, atol=1e-6)
    assert client.val_losses == pytest.approx(losses, abs=1e-6)


def test_loaders_do_as_well_as_a_datamodule(tmp_path: Path) -> None:
    data, by_module, by_loaders = Plain(), make_client(), make_client()
    make_trainer(tmp_path).fit(by_module, datamodule=data)
    make_trainer(tmp_path).fit(by_loaders, data.train_dataloader(), data.val_dataloader())
    for name, tensor in lambda_of(by_module.meta_nets).items():
        assert torch.equal(tensor, lambda_of(by_loaders.meta_nets)[name])


@pytest.mark.parametrize(
    "validation", [{"num_sanity_val_steps": 0}, {"check_val_every_n_epoch": 100}], ids=["each epoch", "sanity check"]
)
def test_validating_during_a_fit_changes_nothing_that_is_learned(tmp_path: Path, validation: dict[str, int]) -> None:
    sets = {name: blobs(12, seed) for seed, name in enumerate(("train", "val", "test"))}
    data = ClientDataModule(ClientData(name="a", pool="seen", **sets), batch_size=6, seed=5)
    clients = [make_client(), make_client()]
    make_trainer(tmp_path, **validation).fit(clients[0], datamodule=data)
    make_trainer(tmp_path, num_sanity_val_steps=0, check_val_every_n_epoch=100).fit(clients[1], datamodule=data)
    assert clients[0].val_losses == pytest.approx(clients[1].val_losses, abs=1e-6)


def test_the_three_parts_of_lambda_have_their_own_rates(tmp_path: Path) -> None:
    groups = make_client().configure_optimizers().param_groups
    assert {group["name"]: group["lr"] for group in groups} == RATES
    client = make_client(meta_lr=RATES | {"lr_net": 0.0})
    start = lambda_of(client.meta_nets)
    make_trainer(tmp_path).fit(client, datamodule=Plain())
    moved = {name.split(".")[0] for name, p in lambda_of(client.meta_nets).items() if not torch.equal(p, start[name])}
    assert moved == {"bn_net", "base_lr"}


@pytest.mark.parametrize("convert", [False, True])
def test_fit_and_test_leave_the_global_model_as_it_was(tmp_path: Path, convert: bool) -> None:
    model = convert_batchnorm(network()) if convert else network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    client = make_client(model)
    held = {name: t.clone() for name, t in client.model.state_dict().items()}
    make_trainer(tmp_path).fit(client, datamodule=Plain())
    make_trainer(tmp_path).test(client, datamodule=Plain(), verbose=False)
    for now, then in ((model.state_dict(), before), (client.model.state_dict(), held)):
        assert all(torch.equal(now[name], tensor) for name, tensor in then.items())


def test_an_iteration_that_is_not_finite_is_counted_and_changes_nothing(tmp_path: Path) -> None:
    client = make_client(estimator=Spy(lambda call: True))
    start = lambda_of(client.meta_nets)
    make_trainer(tmp_path).fit(client, datamodule=Plain())
    assert client.skipped_steps == 3
    assert all(torch.equal(p, start[name]) for name, p in lambda_of(client.meta_nets).items())


def test_the_other_iterations_count_when_one_is_not_finite(tmp_path: Path) -> None:
    client, data = make_client(estimator=Spy(lambda call: call == 1)), Plain()
    expected, _ = learn_by_hand(client.meta_nets, data, iterations=2, epochs=2)
    make_trainer(tmp_path).fit(client, datamodule=data)
    assert client.skipped_steps == 1
    assert len(client.val_losses) == 3
    for name, tensor in expected.items():
        torch.testing.assert_close(lambda_of(client.meta_nets)[name], tensor, rtol=0, atol=1e-6)


def test_a_model_without_batch_norm_learns_rates_only(tmp_path: Path) -> None:
    client = make_client(network(batchnorm=False))
    start = lambda_of(client.meta_nets)
    make_trainer(tmp_path).fit(client, datamodule=Plain())
    results = make_trainer(tmp_path).test(client, datamodule=Plain(), verbose=False)
    assert client.hyperparameters is not None
    assert client.hyperparameters.beta.shape == (0,)
    assert {name.split(".")[0] for name in start} == {"lr_net", "base_lr"}
    assert any(not torch.equal(p, start[name]) for name, p in lambda_of(client.meta_nets).items())
    assert 0 < results[0]["test_loss"] < 10


# What of the Trainer reaches the client


@pytest.mark.parametrize(
    ("limits", "train", "val"),
    [
        ({}, [6, 6, 6, 6], [6, 1]),
        ({"limit_train_batches": 1}, [6, 6], [6, 1]),
        ({"limit_train_batches": 0.5}, [6, 6], [6, 1]),
        ({"limit_val_batches": 1}, [6, 6, 6, 6], [6]),
        ({"limit_val_batches": 0}, [6, 6, 6, 6], [6, 1]),
    ],
    ids=str,
)
def test_limits_reach_the_inner_loop_and_the_meta_loss(
    tmp_path: Path, limits: dict[str, Any], train: list[int], val: list[int]
) -> None:
    estimator = Spy()
    make_trainer(tmp_path, **limits).fit(make_client(estimator=estimator, meta_iterations=1), datamodule=Plain())
    assert estimator.train == [train]
    assert estimator.val == [val]


def test_limited_cuts_as_lightning_does() -> None:
    loader = DataLoader(blobs(10, 0), batch_size=2)
    assert [len(gather_batches(loader, limit=limit)) for limit in (None, 1.0, 3, 99, 0.5, 0)] == [5, 5, 3, 5, 2, 0]
    assert len(gather_batches(loader, epochs=3, limit=2)) == 6


def test_a_logger_gets_the_meta_validation_loss(tmp_path: Path) -> None:
    client, logger = make_client(), CSVLogger(tmp_path, name="logs", version=0)
    make_trainer(tmp_path, logger=logger, log_every_n_steps=1).fit(client, datamodule=Plain())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["meta_val_loss"]]
    assert [float(row["meta_val_loss"]) for row in rows] == pytest.approx(client.val_losses, rel=1e-5)
    assert [float(row["skipped_steps"]) for row in rows] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:.*tensorboardX")
def test_the_default_trainer_with_its_files_and_sanity_check_works(tmp_path: Path) -> None:
    client = make_client()
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=tmp_path, log_every_n_steps=1)
    trainer.fit(client, datamodule=Plain())
    assert len(client.val_losses) == 3


# Personalization


def test_testing_personalizes_on_the_training_data_first(tmp_path: Path) -> None:
    client, data = make_client(), Plain()
    results = make_trainer(tmp_path).test(client, datamodule=data, verbose=False)
    model, state, beta = personalize_by_hand(client, data)
    outputs, loss = evaluate(model, state, beta, data.batches("test"))[:2]
    targets = torch.cat([y for _, y in data.batches("test")])
    assert results[0]["test_loss"] == pytest.approx(float(loss), abs=1e-6)
    assert results[0]["test_acc"] == pytest.approx(float((outputs.argmax(1) == targets).float().mean()), abs=1e-6)
    assert client.personalized is not None
    for name, tensor in state.parameters.items():
        torch.testing.assert_close(client.personalized.parameters[name], tensor, rtol=0, atol=1e-6)
    untouched = evaluate(model, start_of(model, client.statistics), torch.zeros(1), data.batches("test"))  # type: ignore[arg-type]
    assert abs(float(untouched[1] - loss)) > 1e-3


def test_batch_statistics_at_testing_are_those_of_the_whole_test_set(tmp_path: Path) -> None:
    client, data = make_client(evaluation_statistics="batch"), Plain(test=15)
    results = make_trainer(tmp_path).test(client, datamodule=data, verbose=False)
    model, state, beta = personalize_by_hand(client, data)
    batches = data.batches("test")
    assert len(batches) == 3
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    outputs, _ = model(state.parameters, state.buffers, beta, inputs, training=False, batch_statistics=True)
    assert results[0]["test_loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, targets)), abs=1e-6)
    assert results[0]["test_acc"] == pytest.approx(float((outputs.argmax(1) == targets).float().mean()), abs=1e-6)
    one_by_one = [model(*state, beta, x, training=False, batch_statistics=True)[0] for x, _ in batches]
    assert not torch.allclose(torch.cat(one_by_one), outputs, atol=1e-3)


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_validate_measures_the_personalized_model(tmp_path: Path, statistics: str) -> None:
    client, data = make_client(evaluation_statistics=statistics), Plain()
    results = make_trainer(tmp_path).validate(client, datamodule=data, verbose=False)
    model, state, beta = personalize_by_hand(client, data)
    loss = evaluate(model, state, beta, data.batches("val"), bn_mode=statistics)[1]  # type: ignore[arg-type]
    assert results[0]["val_loss"] == pytest.approx(float(loss), abs=1e-6)


def test_a_recipe_takes_the_place_of_the_nets(tmp_path: Path) -> None:
    model = FunctionalModel.of(convert_batchnorm(network()))
    client, data = make_client(recipe=FixedRecipe.fitting(model, beta=0.25, rate=0.0)), Plain()
    make_trainer(tmp_path).test(client, datamodule=data, verbose=False)
    assert client.hyperparameters is not None
    assert client.hyperparameters.beta.tolist() == [0.25]
    assert client.hyperparameters.eta.tolist() == [0.0] * 6
    assert client.personalized is not None
    for name, tensor in model.tensors()[0].items():
        assert torch.equal(client.personalized.parameters[name], tensor)


def test_statistics_come_from_a_statistics_dataloader_where_there_is_one(tmp_path: Path) -> None:
    class Augmented(Plain):
        def statistics_dataloader(self) -> DataLoader[Any]:
            return DataLoader(blobs(20, 9), batch_size=20)

    client = make_client()
    make_trainer(tmp_path).test(client, datamodule=Augmented(), verbose=False)
    assert client.statistics is not None
    expected = collect_statistics(convert_batchnorm(network()), [blobs(20, 9).tensors])
    assert client.statistics.num_samples == 20
    close(client.statistics.layer_moments, expected.layer_moments, 1e-6)


def test_given_statistics_are_not_collected_again(tmp_path: Path) -> None:
    given = collect_statistics(convert_batchnorm(network()), [blobs(20, 9).tensors])
    client = make_client(statistics=given)
    make_trainer(tmp_path).fit(client, datamodule=Plain())
    assert client.statistics is given


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"meta_iterations": 0}, "meta_iterations is 0"),
        ({"finetune_epochs": -1}, "finetune_epochs is -1"),
        ({"clip_value": 0.0}, "clip_value is 0.0"),
        ({"evaluation_statistics": "own"}, "'own'; allowed are 'running' and 'batch'"),
    ],
)
def test_impossible_settings_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_client(**options)


def test_meta_rates_must_be_for_the_three_parts() -> None:
    with pytest.raises(ConfigError, match="base_lr"):
        make_client(meta_lr={"bn_net": 0.1}).configure_optimizers()


def test_an_unknown_start_of_the_running_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allowed are 'measured' and 'zero_one'"):
        make_trainer(tmp_path).fit(make_client(running_start="warm"), datamodule=Plain())


def test_a_model_that_cannot_be_mixed_is_refused_by_the_layer_s_name() -> None:
    with pytest.raises(ModelError, match="'1'"):
        make_client(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)))


def test_testing_with_a_loader_alone_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train data.*DataModule"):
        make_trainer(tmp_path).test(make_client(), DataLoader(blobs(6, 0), batch_size=6), verbose=False)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
def test_fitting_without_validation_data_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"val data.*DataModule"):
        make_trainer(tmp_path).fit(make_client(), DataLoader(blobs(6, 0), batch_size=6))
