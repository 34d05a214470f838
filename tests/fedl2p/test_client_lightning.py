"""`FedL2PClient` as a Lightning user knows modules: prediction, checkpoints, bars, lines, and LightningCLI."""

import math
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from client_cases import Data, Net, assert_same, lambda_of, make_client, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from fedl2p import FedL2PClient, MetaNets, convert_batchnorm
from fedl2p.errors import DataError, ModelError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
# Prediction


def test_predictions_are_of_the_personalized_model_and_those_that_testing_measures(tmp_path: Path) -> None:
    client, data = make_client(), Data()
    tested = make_trainer(tmp_path).test(client, datamodule=data, verbose=False)[0]
    parts = make_trainer(tmp_path).predict(client, datamodule=data)
    assert parts is not None
    outputs = torch.cat([part for part in parts if isinstance(part, Tensor)])
    inputs, targets = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    torch.testing.assert_close(client(inputs), outputs)
    assert tested["test_loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, targets)), abs=1e-6)
    plain = Net()
    plain.load_state_dict(
        {name: t for name, t in client.model.state_dict().items() if "pretrained" not in name}, strict=False
    )
    assert not torch.allclose(plain.eval()(inputs), outputs, atol=1e-3)


def test_before_a_personalization_outputs_are_the_global_model_s() -> None:
    torch.manual_seed(0)
    net = Net()
    inputs = torch.randn(5, 4)
    torch.testing.assert_close(FedL2PClient(net, num_classes=3)(inputs), net.eval()(inputs))


def test_predicting_personalizes_first(tmp_path: Path) -> None:
    client = make_client()
    make_trainer(tmp_path).predict(client, datamodule=Data())
    assert client.personalized is not None and client.hyperparameters is not None


def test_a_test_after_a_fit_with_loaders_needs_no_more_training_data(tmp_path: Path) -> None:
    data, client, other = Data(), make_client(), make_client()
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.fit(client, data.train_dataloader(), data.val_dataloader())
    same = trainer.test(client, data.test_dataloader(), verbose=False)[0]
    fresh = make_trainer(tmp_path).test(client, data.test_dataloader(), verbose=False)[0]
    make_trainer(tmp_path, limit_val_batches=1.0).fit(other, datamodule=data)
    by_module = make_trainer(tmp_path).test(other, datamodule=data, verbose=False)[0]
    assert same == pytest.approx(fresh)
    assert same == pytest.approx(by_module)
    with pytest.raises(DataError, match="train data"):
        make_trainer(tmp_path).test(make_client(), data.test_dataloader(), verbose=False)


# Checkpoints


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")  # of any manual optimization
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the fit that goes on keeps no checkpoints
@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch"
)  # an iteration needs none
def test_a_fit_goes_on_with_the_iterations_that_are_left(tmp_path: Path) -> None:
    """6 iterations at once, and 3 and then those that are left, in the middle of an epoch."""
    whole = make_client(meta_iterations=6)
    make_trainer(tmp_path).fit(whole, datamodule=Data())
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = make_client(meta_iterations=3)
    make_trainer(tmp_path, enable_checkpointing=True, callbacks=[keep]).fit(first, datamodule=Data())
    stopped = tmp_path / "kept" / "step=3.ckpt"
    going_on = make_client(meta_iterations=6)
    trainer = make_trainer(tmp_path)
    trainer.fit(going_on, datamodule=Data(), ckpt_path=stopped)
    assert len(going_on.val_losses) == trainer.global_step == 6
    assert going_on.val_losses == pytest.approx(whole.val_losses, abs=1e-6)
    assert_same(lambda_of(whole), lambda_of(going_on))
    again = make_client(meta_iterations=6)
    make_trainer(tmp_path).fit(again, datamodule=Data(), ckpt_path=stopped)
    make_trainer(tmp_path).fit(again, datamodule=Data())  # a new fit, not one that goes on
    assert len(again.val_losses) == 6


def test_a_client_is_loaded_with_its_settings_and_nets(tmp_path: Path) -> None:
    client = make_client(clip_value=0.5, evaluation_statistics="batch")
    trainer = make_trainer(tmp_path)
    trainer.fit(client, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "client.ckpt")
    loaded = FedL2PClient.load_from_checkpoint(tmp_path / "client.ckpt", model=Net())
    assert loaded.settings == client.settings
    assert loaded.hparams["num_classes"] == 3 and loaded.hparams["base_lr"] == 0.1
    assert_same(lambda_of(client), lambda_of(loaded))
    results = [make_trainer(tmp_path).test(c, datamodule=Data(), verbose=False)[0] for c in (client, loaded)]
    assert results[0] == pytest.approx(results[1])


def test_a_loaded_client_starts_a_new_fit_at_its_first_iteration(tmp_path: Path) -> None:
    """Its nets are the checkpoint's; only `ckpt_path` in a fit goes on with one."""
    trainer = make_trainer(tmp_path)
    trainer.fit(make_client(), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "client.ckpt")
    loaded = FedL2PClient.load_from_checkpoint(tmp_path / "client.ckpt", model=Net())
    validated = make_client()
    make_trainer(tmp_path, limit_val_batches=1.0).validate(
        validated, datamodule=Data(), ckpt_path=tmp_path / "client.ckpt", verbose=False
    )
    for client in (loaded, validated):
        before = lambda_of(client)
        make_trainer(tmp_path).fit(client, datamodule=Data())
        assert len(client.val_losses) == 3
        assert any(not torch.equal(before[name], p) for name, p in lambda_of(client).items())


@pytest.mark.parametrize("options", [{"log_divergence": False}, {"sample_count": True}], ids=str)
def test_nets_that_read_other_inputs_are_not_loaded_in_silence(tmp_path: Path, options: dict[str, bool]) -> None:
    model = convert_batchnorm(Net())
    trainer = make_trainer(tmp_path)
    trainer.fit(make_client(meta_nets=MetaNets(model, **options)), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "client.ckpt")
    with pytest.raises(ModelError, match=f"differ.*{next(iter(options))}"):
        FedL2PClient.load_from_checkpoint(tmp_path / "client.ckpt", model=Net())
    nets = MetaNets(model, **options)
    FedL2PClient.load_from_checkpoint(tmp_path / "client.ckpt", model=Net(), meta_nets=nets)


def test_a_checkpoint_brings_its_own_global_model(tmp_path: Path) -> None:
    client, trainer = make_client(), make_trainer(tmp_path)
    trainer.fit(client, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "client.ckpt")
    other = Net()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3)
    loaded = FedL2PClient.load_from_checkpoint(tmp_path / "client.ckpt", model=other)
    results = [make_trainer(tmp_path).test(c, datamodule=Data(), verbose=False)[0] for c in (client, loaded)]
    assert results[0] == pytest.approx(results[1])


# What is shown


class Epochs(L.Callback):
    """Keeps what bars show: the epoch, and the number of epochs."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int | None]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.shown.append((trainer.current_epoch, trainer.max_epochs))


@pytest.mark.parametrize(("iterations", "epochs"), [(1, 1), (2, 1), (3, 2), (6, 3)])
def test_bars_count_the_epochs_that_the_iterations_are(tmp_path: Path, iterations: int, epochs: int) -> None:
    seen = Epochs()
    trainer = make_trainer(tmp_path, callbacks=[seen], max_epochs=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of our own construction
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        warnings.filterwarnings("ignore", ".*many workers.*")
        trainer.fit(make_client(meta_iterations=iterations), datamodule=Data())
    assert seen.shown == [(epoch, epochs) for epoch in range(epochs)]
    assert trainer.max_epochs == 5


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")  # Lightning's, to whoever sets none
@pytest.mark.parametrize(("epochs", "said"), [(7, True), (1, False), (None, False)])
def test_epochs_that_are_not_used_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, epochs: int | None, said: bool
) -> None:
    trainer = make_trainer(tmp_path, max_epochs=epochs)
    with caplog.at_level("INFO"):
        trainer.fit(make_client(), datamodule=Data())
    lines = [line for line in caplog.messages if "max_epochs" in line and "meta_iterations=3" in line]
    assert bool(lines) == said


# LightningCLI


@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, to Lightning
@pytest.mark.parametrize("command", ["fit", "test"])
def test_lightning_cli_takes_the_client_and_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    arguments = [
        command,
        "--model.model=test_client_lightning.Net",
        "--model.num_classes=3",
        "--model.settings.finetune_epochs=2",
        "--model.settings.meta_iterations=2",
        "--model.settings.meta_lr.bn_net=0.2",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.limit_val_batches=0",
        "--trainer.max_epochs=1",
    ]
    cli = LightningCLI(FedL2PClient, Data, save_config_callback=None, seed_everything_default=0, args=arguments)
    assert cli.model.settings.finetune_epochs == 2
    assert cli.model.settings.meta_lr.bn_net == 0.2
    if command == "fit":
        assert len(cli.model.val_losses) == 2
    else:
        assert math.isfinite(float(cli.trainer.callback_metrics["test_loss"]))
