"""A user's own data and model, which take a second a run."""

from pathlib import Path

import pytest


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module outside of the project, and a configuration that names its classes."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_package.py").write_text(MY_PACKAGE)
    (tmp_path / "mine.yaml").write_text(MY_CONFIG)
    monkeypatch.syspath_prepend(tmp_path / "code")
    return str(tmp_path / "mine.yaml")


MY_PACKAGE = """
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedl2p.datamodules import ClientData, FederatedDataModule


class MyData(FederatedDataModule):
    num_classes = 3

    def __init__(self, *, clients=3, unseen=2, drawn="by number", **options):
        super().__init__(**options)
        self.drawn = drawn
        self.counts = clients, unseen

    def build_clients(self):
        seen, unseen = self.counts
        if self.drawn == "anew":
            random.seed()
            np.random.seed()
            torch.seed()
        for number in range(seen + unseen):
            generator = torch.Generator().manual_seed(number)
            if self.drawn != "by number":
                # From each of the three generators that the whole process shares.
                draws = random.randrange(1000), int(np.random.randint(1000)), int(torch.randint(1000, ()))
                generator.manual_seed(sum(draws))

            def points(count):
                inputs = number / 2 + torch.randn(count, 5, generator=generator)
                return TensorDataset(inputs, torch.randint(3, (count,), generator=generator))

            pool = "seen" if number < seen else "unseen"
            yield ClientData(name=f"m{number}", pool=pool, train=points(6 + number), val=points(4), test=points(5))


class MyNet(nn.Module):
    def __init__(self, batchnorm=True):
        super().__init__()
        middle = [nn.BatchNorm1d(4)] if batchnorm else []
        self.layers = nn.Sequential(nn.Linear(5, 4), *middle, nn.ReLU(), nn.Linear(4, 3))

    def forward(self, inputs):
        return self.layers(inputs)
"""
MY_CONFIG = """
data: {class_path: my_package.MyData, init_args: {batch_size: 4}}
model: {class_path: my_package.MyNet}
pretraining: {rounds: 0}
client: {finetune_epochs: 1, meta_iterations: 1}
federation: {rounds: 1, client_fraction: 0.5}
baselines: {rates: [0.1, 0.3]}
wandb: {mode: disabled}
"""
