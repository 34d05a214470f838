"""`FedL2PClient` through stages in any order, with other data, other Trainers, copies and precisions."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from client_cases import Data, Net, lambda_of, make_client, make_trainer
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError

from fedl2p import ClientStatistics, FedL2PClient, collect_statistics, convert_batchnorm, make_episode, stack
from fedl2p.errors import ConfigError, DataError, ModelError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Scaled(Data):
    """Another client's data: the inputs three times as large."""

    def loader(self, count: int, seed: int) -> DataLoader[Any]:
        loader = super().loader(count, seed)
        inputs, targets = loader.dataset.tensors  # type: ignore[attr-defined]  # of a TensorDataset
        return DataLoader(TensorDataset(3 * inputs, targets), batch_size=self.batch_size)


def fitted(folder: Path, data: Data, **options: Any) -> FedL2PClient:
    client = make_client(**options)
    make_trainer(folder, limit_val_batches=1.0).fit(client, datamodule=data)
    return client


def measured(client: FedL2PClient, folder: Path, data: Any, **options: Any) -> Any:
    return make_trainer(folder, **options).test(client, datamodule=data, verbose=False)[0]


def predicted(client: FedL2PClient, folder: Path, data: Any) -> Tensor:
    parts: Any = make_trainer(folder).predict(client, datamodule=data)
    return torch.cat(parts)


# Stages in any order


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_fit_after_another_stage_learns_the_same(tmp_path: Path, stage: str) -> None:
    client = make_client()
    getattr(make_trainer(tmp_path, limit_val_batches=1.0), stage)(client, datamodule=Data(), verbose=False)
    make_trainer(tmp_path, limit_val_batches=1.0).fit(client, datamodule=Data())
    assert client.val_losses == fitted(tmp_path, Data()).val_losses


def test_predictions_after_a_fit_are_not_those_of_an_earlier_personalization(tmp_path: Path) -> None:
    client = make_client(meta_lr={"bn_net": 0.5, "lr_net": 0.5, "base_lr": 0.5})
    early = predicted(client, tmp_path, Data())
    make_trainer(tmp_path).fit(client, datamodule=Data())
    late = predicted(client, tmp_path, Data())
    assert not torch.allclose(early, late, atol=1e-3)
    measured(client, tmp_path, Data())
    torch.testing.assert_close(predicted(client, tmp_path, Data()), late)


@pytest.mark.parametrize("least", [{"min_epochs": 9}, {"min_steps": 9}], ids=str)
def test_no_limit_of_the_trainer_makes_a_fit_longer(tmp_path: Path, least: dict[str, int]) -> None:
    client, trainer = make_client(), make_trainer(tmp_path, **least)
    trainer.fit(client, datamodule=Data())
    assert len(client.val_losses) == 3
    assert getattr(trainer, *least) == 9


def test_one_trainer_serves_several_clients_each_with_its_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path)
    clients = [make_client(), make_client()]
    with caplog.at_level("INFO"):
        for client, data in zip(clients, (Data(), Scaled()), strict=True):
            trainer.fit(client, data.train_dataloader(), data.val_dataloader())
            assert len(client.val_losses) == 3
    assert not [line for line in caplog.messages if "override existing callbacks" in line]
    for client, data in zip(clients, (Data(), Scaled()), strict=True):
        again = trainer.test(client, data.test_dataloader(), verbose=False)[0]
        assert again == pytest.approx(measured(client, tmp_path, data))


def test_outputs_after_a_test_can_be_differentiated(tmp_path: Path) -> None:
    client = make_client()
    measured(client, tmp_path, Data())
    inputs = torch.ones(2, 4, requires_grad=True)
    client(inputs).sum().backward()
    assert inputs.grad is not None and bool(inputs.grad.abs().sum() > 0)


# Other data


def test_statistics_are_those_of_the_data_at_hand(tmp_path: Path) -> None:
    client = fitted(tmp_path, Data())
    other = make_client()
    other.meta_nets.load_state_dict(client.meta_nets.state_dict())
    assert measured(client, tmp_path, Scaled()) == pytest.approx(measured(other, tmp_path, Scaled()))
    torch.testing.assert_close(predicted(client, tmp_path, Data()), predicted(other, tmp_path, Data()))


def test_given_statistics_stay_with_other_data(tmp_path: Path) -> None:
    given = _statistics(make_client())
    client = fitted(tmp_path, Data(), statistics=given)
    measured(client, tmp_path, Scaled())
    assert client.statistics is given


def _statistics(client: FedL2PClient) -> ClientStatistics:
    return collect_statistics(client.model, Data().train_dataloader())


def test_statistics_of_a_wider_model_are_refused(tmp_path: Path) -> None:
    client = FedL2PClient(Net(width=7), num_classes=3, statistics=_statistics(make_client()))
    with pytest.raises(ModelError, match="another model"):
        measured(client, tmp_path, Data())


class Two(Data):
    """Validation, test and prediction data in two loaders each."""

    def val_dataloader(self) -> Any:
        return [self.loader(8, 1), self.loader(6, 3)]

    def test_dataloader(self) -> Any:
        return [self.loader(8, 2), self.loader(6, 4)]

    def predict_dataloader(self) -> Any:
        return self.test_dataloader()


class Joined(Data):
    """The same data in one loader each."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(ConcatDataset([part.dataset for part in Two(8).val_dataloader()]), batch_size=8)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(ConcatDataset([part.dataset for part in Two(8).test_dataloader()]), batch_size=8)


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_several_loaders_of_a_kind_are_one_set(tmp_path: Path, statistics: str) -> None:
    client, other = (fitted(tmp_path, data, evaluation_statistics=statistics) for data in (Two(8), Joined(8)))
    assert client.val_losses == pytest.approx(other.val_losses)
    assert measured(client, tmp_path, Two(8)) == pytest.approx(measured(other, tmp_path, Joined(8)))
    outputs: Any = make_trainer(tmp_path).predict(client, datamodule=Two(8))
    assert [len(parts) for parts in outputs] == [1, 1]


def test_validation_loaders_serve_a_fit_that_does_not_validate(tmp_path: Path) -> None:
    data, client = Data(), make_client()
    make_trainer(tmp_path).fit(client, data.train_dataloader(), data.val_dataloader())  # limit_val_batches=0
    assert client.val_losses == fitted(tmp_path, Data()).val_losses


class Hooked(Data):
    """What `Scaled` has, scaled on its way to the device, from batches that are dicts."""

    def loader(self, count: int, seed: int) -> DataLoader[Any]:
        pairs = super().loader(count, seed).dataset
        return DataLoader([{"x": x, "y": y} for x, y in pairs], batch_size=self.batch_size)  # type: ignore[arg-type, attr-defined, var-annotated]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 3 * batch["x"], batch["y"]


def test_hooks_of_a_data_module_see_all_that_the_client_learns_from(tmp_path: Path) -> None:
    client, expected = fitted(tmp_path, Hooked()), fitted(tmp_path, Scaled())
    assert client.val_losses == pytest.approx(expected.val_losses)
    assert measured(client, tmp_path, Hooked()) == pytest.approx(measured(expected, tmp_path, Scaled()))


def test_empty_validation_data_are_said(tmp_path: Path) -> None:
    class NoVal(Data):
        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader([])  # type: ignore[arg-type]  # a list will do

    with pytest.raises(DataError, match="no val data"):
        make_trainer(tmp_path).fit(make_client(), datamodule=NoVal())


# Episodes


def test_a_client_that_is_not_finite_does_not_move_its_cohort(tmp_path: Path) -> None:
    client = make_client()
    train, val = list(Data().train_dataloader()), list(Data().val_dataloader())
    good = make_episode(client.learner.model, _statistics(client), train * 2, val)
    bad = good._replace(val_batches=[(x * float("nan"), y) for x, y in val])
    moves, skipped = [], []
    for episode in (good, stack([good, bad]), stack([bad, bad])):
        client = make_client(meta_iterations=1)
        before = lambda_of(client)
        loader = DataLoader([episode], batch_size=None, collate_fn=lambda item: item)  # type: ignore[arg-type, var-annotated]
        make_trainer(tmp_path).fit(client, loader, loader)
        moves.append({name: p - before[name] for name, p in lambda_of(client).items()})
        skipped.append(client.skipped_steps)
        with pytest.raises(DataError, match="episodes"):
            make_trainer(tmp_path).test(client, Data().test_dataloader(), verbose=False)
    assert skipped == [0, 0, 1]
    for name, move in moves[0].items():
        torch.testing.assert_close(moves[1][name], move, rtol=0, atol=1e-6)
        assert bool((moves[2][name] == 0).all())


# The client as an object


def test_a_converted_model_is_left_as_it_is() -> None:
    model = convert_batchnorm(Net())
    client = FedL2PClient(model, num_classes=3)
    assert all(p.requires_grad for p in model.parameters())
    assert client.model is not model


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))])
def test_copies_answer_the_same_and_take_no_data_along(tmp_path: Path, duplicate: Any, compile: bool) -> None:
    client, data = make_client(compile=compile, finetune_epochs=0), Data()
    make_trainer(tmp_path).fit(client, data.train_dataloader(), data.val_dataloader())
    inputs = torch.ones(2, 4)
    expected = measured(client, tmp_path, data)
    same = duplicate(client)
    torch.testing.assert_close(same(inputs), client(inputs))
    assert same.learner.model.module is same.model and same.learner.meta_nets is same.meta_nets
    with pytest.raises(DataError, match="train data"):
        make_trainer(tmp_path).test(same, data.test_dataloader(), verbose=False)
    assert measured(same, tmp_path, data) == pytest.approx(expected)


def test_the_personalized_state_is_cast_with_the_module(tmp_path: Path) -> None:
    client = make_client()
    measured(client, tmp_path, Data())
    assert client.double()(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_testing_fine_tunes_in_the_trainer_s_precision(tmp_path: Path, precision: Any) -> None:
    kinds: set[torch.dtype] = set()

    class Watched(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            if self.training:  # in fine-tuning only
                kinds.add(outputs.dtype)
            return outputs

    client = FedL2PClient(nn.Sequential(Watched(4, 5), nn.Tanh(), nn.Linear(5, 3)), finetune_epochs=1)
    measured(client, tmp_path, Data(), precision=precision)
    assert kinds == {torch.float64 if precision == "64-true" else torch.bfloat16}


def test_a_metric_named_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="named 'loss'"):
        make_client(metrics={"loss": MeanAbsoluteError()})
