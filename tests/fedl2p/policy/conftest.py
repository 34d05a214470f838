"""Policies that were never trained, on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core_cases import ConvNet, seeded
from torch import nn

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.settings import LearnerSettings
from fedl2p.policy.files import META_NETS, write_policy

Write = Callable[..., Path]


@pytest.fixture
def network() -> nn.Module:
    """A small network in float32, as a user has it."""
    return seeded(ConvNet).float().eval()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes new nets for a model into a run's folder, with rates that fine-tuning bears."""

    def make(model: nn.Module, *, input_shape: tuple[int, ...] | None = None, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        nets = MetaNets(convert_batchnorm(model), base_lr=0.05).to(next(model.parameters()))
        recipes = [
            Hyperparameters(torch.full((len(nets.batchnorm_names),), b), torch.full((len(nets.parameter_names),), e))
            for b, e in ((0.2, 0.1), (0.6, 0.3))
        ]
        write_policy(
            tmp_path / "run" / META_NETS,
            nets,
            {name: p.detach() for name, p in nets.named_parameters()},
            settings=LearnerSettings(finetune_epochs=3),
            input_shape=input_shape,
            recipes=recipes,
        )
        return tmp_path / "run"

    return make
