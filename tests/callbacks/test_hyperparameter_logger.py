"""The client's recipe in a Lightning logger."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedl2p.callbacks import HyperparameterLogger
from fedl2p.client import FedL2PClient

# Lightning's own: small loaders, and a name that it still uses and torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Recorder(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not of interest."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))


def client() -> FedL2PClient:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    return FedL2PClient(model, num_classes=3, base_lr=0.05, meta_iterations=3, finetune_epochs=1)


def trainer(folder: Path, loggers: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=loggers,
        callbacks=[HyperparameterLogger()],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        max_epochs=1,
    )


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(12, 4, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=6)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return loader()


def fit(module: FedL2PClient, folder: Path, loggers: Any) -> None:
    trainer(folder, loggers).fit(module, datamodule=Data())


def test_every_iteration_is_logged_by_name(tmp_path: Path) -> None:
    module, first, second = client(), Recorder(), Recorder()
    fit(module, tmp_path, [first, second])
    logged = [(step, metrics) for step, metrics in first.logged if "beta/1" in metrics]
    assert [step for step, _ in logged] == [1, 2, 3]
    recipe = {"beta/1", *(f"eta/{name}" for name in module.meta_nets.parameter_names)}
    assert set(logged[0][1]) == {"meta_val_loss", *recipe}
    assert [metrics["meta_val_loss"] for _, metrics in logged] == module.val_losses
    # Lightning's own line of the same iteration is at the same step.
    own = {step: metrics["meta_val_loss"] for step, metrics in first.logged if "skipped_steps" in metrics}
    assert own == pytest.approx({step: metrics["meta_val_loss"] for step, metrics in logged})
    assert module.hyperparameters is not None
    last = logged[-1][1]
    assert last["beta/1"] == pytest.approx(module.hyperparameters.beta.item())
    assert [last[f"eta/{name}"] for name in module.meta_nets.parameter_names] == pytest.approx(
        module.hyperparameters.eta.tolist()
    )
    assert logged[0][1] != last
    assert [metrics for _, metrics in second.logged if "beta/1" in metrics] == [metrics for _, metrics in logged]


def test_the_recipe_that_was_tested_is_logged(tmp_path: Path) -> None:
    module, recorder = client(), Recorder()
    fit(module, tmp_path, False)
    trainer(tmp_path, recorder).test(module, loader(), verbose=False)
    assert module.hyperparameters is not None
    (tested,) = [(step, metrics) for step, metrics in recorder.logged if "test/beta/1" in metrics]
    assert tested[0] == 3
    assert tested[1]["test/beta/1"] == pytest.approx(module.hyperparameters.beta.item())
    assert len(tested[1]) == 1 + len(module.meta_nets.parameter_names)


def test_lightnings_own_logger_takes_it(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version="0")
    fit(client(), tmp_path, logger)
    header = (tmp_path / "run" / "0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"beta/1", "eta/0.weight", "eta/3.bias"} <= set(header)


def test_no_logger_and_no_recipe_are_no_trouble(tmp_path: Path) -> None:
    fit(client(), tmp_path, False)
    module, recorder = client(), Recorder()
    HyperparameterLogger().on_train_batch_end(trainer(tmp_path, recorder), module, None, None, 0)
    assert recorder.logged == []
