"""Folded models are plain ones that predict what the mixed ones do, and leave through every door."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from core_cases import ConvNet, seeded
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.episode import make_episode
from fedl2p.core.finetune import predict
from fedl2p.core.functional import FunctionalModel, InnerState
from fedl2p.core.learner import Learner
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.settings import LearnerSettings
from fedl2p.core.statistics import collect_statistics
from fedl2p.models import SmallConvNet
from fedl2p.policy import Policy
from fedl2p.policy.folding import fold

vision = torchvision.models


class Shared(nn.Module):
    """One batch norm in two places and in a plain list, an instance norm that tracks, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, momentum=None)
        self.again = self.bn
        self.norm = nn.InstanceNorm2d(4, track_running_stats=True)
        self.order = [self.norm, self.bn]
        self.register_buffer("offset", torch.ones(4, 1, 1), persistent=False)
        self.head = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.bn(self.conv(inputs))) + self.offset
        for layer in self.order:
            hidden = layer(hidden)
        return self.head(self.again(hidden).mean((2, 3)))


class Learned(nn.Module):
    """timm's batch norm with an activation that has parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = BatchNormAct2d(4, act_layer=nn.PReLU, inplace=False)
        self.head = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(inputs)).mean((2, 3)))


class Volumes(nn.Module):
    """Batch norms of one and three dimensions, one without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3)
        self.wide = nn.BatchNorm3d(4, affine=False)
        self.narrow = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.wide(self.conv(inputs[:, None])))
        return self.head(torch.tanh(self.narrow(hidden.mean((2, 3, 4)))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small": lambda: SmallConvNet(in_channels=3, num_classes=4, widths=(4, 8)),
    "resnet18": lambda: vision.resnet18(num_classes=4),
    "mobilenet_v3, with Hardsigmoid": lambda: vision.mobilenet_v3_small(num_classes=4),
    "efficientnet, with StochasticDepth": lambda: vision.efficientnet_b0(num_classes=4),
    "timm, with BatchNormAct2d": lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
    "timm, with an activation that learns": Learned,
    "shared layers": Shared,
    "one and three dimensions": Volumes,
    "without batch norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)),
}


def personalized(plain: nn.Module) -> tuple[FunctionalModel, InnerState, Tensor]:
    """After one step, with the betas 0, 0.3, 1, 0, ... ."""
    model = FunctionalModel.of(convert_batchnorm(plain).requires_grad_(False))
    beta = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64).repeat(len(model.batchnorm_names))
    beta = beta[: len(model.batchnorm_names)]
    reference = next(plain.parameters())
    data = [(2 * torch.randn(8, 3, 32, 32).to(reference), torch.randint(4, (8,)))]
    learner = Learner(model, MetaNets(model.module).to(reference), settings=LearnerSettings(finetune_epochs=1))
    episode = make_episode(model, collect_statistics(model.module, data), data)
    eta = torch.full((len(model.parameter_names),), 1e-3)
    return (
        model,
        learner.personalize(episode, Hyperparameters(beta.to(reference), eta.to(reference))),
        beta.to(reference),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_predicts_what_the_mixed_one_does_on_every_sample(name: str) -> None:
    torch.manual_seed(0)
    plain = seeded(MODELS[name]).eval()
    model, state, beta = personalized(plain)
    folded = fold(plain, model, state, beta)
    inputs = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = predict(model, state, beta, inputs)
        torch.testing.assert_close(folded(inputs), expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(plain(inputs), expected, rtol=1e-3)
    assert [type(module) for module in folded.modules()] == [type(module) for module in plain.modules()]
    fresh = MODELS[name]().double().eval()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fresh(inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_in_single_precision_probabilities_agree_to_1e_6(name: str) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]().eval()
    model, state, beta = personalized(plain)
    inputs = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        mixed = predict(model, state, beta, inputs).softmax(1)
        torch.testing.assert_close(fold(plain, model, state, beta)(inputs).softmax(1), mixed, rtol=0, atol=1e-6)


@pytest.fixture
def served(write: Any) -> tuple[nn.Module, Tensor]:
    """A model from a policy, and inputs for it."""
    torch.manual_seed(0)
    model = seeded(ConvNet).float().eval()
    data = [(torch.randn(8, 1, 4, 4), torch.randint(3, (8,)))]
    return Policy.load(write(model)).personalize(model, data), torch.randn(5, 1, 4, 4)


def test_it_is_saved_whole_and_as_a_state_dict(served: tuple[nn.Module, Tensor]) -> None:
    model, inputs = served
    whole, state = io.BytesIO(), io.BytesIO()
    torch.save(model, whole)
    torch.save(model.state_dict(), state)
    whole.seek(0)
    state.seek(0)
    loaded = ConvNet().eval()
    loaded.load_state_dict(torch.load(state, weights_only=True), strict=True)
    for other in (torch.load(whole, weights_only=False), loaded):
        assert torch.equal(other(inputs), model(inputs))


def test_it_is_exported_by_torch(served: tuple[nn.Module, Tensor]) -> None:
    model, inputs = served
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts
        exported = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("samples")},))
        torch.testing.assert_close(exported.module()(inputs[:2]), model(inputs[:2]))


def test_it_is_exported_to_onnx(served: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, inputs = served
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        torch.onnx.export(model, (inputs,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(inputs).detach(), rtol=1e-5, atol=1e-6)
