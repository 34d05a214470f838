"""A tiny client, its data and a quiet Trainer, which the tests of the Lightning module share."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedl2p import FedL2PClient

RATES = {"bn_net": 0.05, "lr_net": 0.02, "base_lr": 0.01}


class Net(nn.Sequential):
    """A tiny classifier of 3 classes with a batch norm."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))


class Data(L.LightningDataModule):
    """12 training samples in two batches, and 8 of each other kind."""

    def __init__(self, batch_size: int = 6) -> None:
        super().__init__()
        self.batch_size = batch_size

    def loader(self, count: int, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        inputs = 1 + 2 * torch.randn(count, 4, generator=generator)
        return DataLoader(
            TensorDataset(inputs, torch.randint(3, (count,), generator=generator)), batch_size=self.batch_size
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(12, 0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(8, 1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(8, 2)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.loader(8, 2)


def make_client(**options: Any) -> FedL2PClient:
    torch.manual_seed(4)
    settings: dict[str, Any] = {"base_lr": 0.1, "meta_iterations": 3, "finetune_epochs": 2, "meta_lr": RATES}
    return FedL2PClient(Net(), num_classes=3, **(settings | options))


def quiet_trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    return L.Trainer(**(quiet | options))


def make_trainer(folder: Path, **options: Any) -> L.Trainer:
    """One that does not validate during a fit, unless asked to."""
    return quiet_trainer(folder, **({"limit_val_batches": 0} | options))


def lambda_of(client: FedL2PClient) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in client.meta_nets.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=0, atol=1e-7)
