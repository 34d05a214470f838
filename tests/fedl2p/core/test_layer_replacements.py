"""Replacements answer what the layers that they replace answer, and let second derivatives and vmap pass."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from core_cases import seeded
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torchvision.ops import StochasticDepth

import fedl2p.core.differentiation  # noqa: F401  (prepares forward mode)
from fedl2p.core.batchnorm import MixedBatchNorm2d, batchnorm_names, convert_batchnorm
from fedl2p.core.functional import FunctionalModel
from fedl2p.core.layer_replacements import replacement_of


def replaced(module: nn.Module) -> nn.Module:
    found = replacement_of(module)
    assert found is not None
    return found


def test_hardsigmoid_and_its_derivatives() -> None:
    inputs = torch.tensor([-4.0, -3.5, -1.0, 0.2, 2.9, 3.5], dtype=torch.float64, requires_grad=True)
    layer = replaced(nn.Hardsigmoid())
    torch.testing.assert_close(layer(inputs), nn.functional.hardsigmoid(inputs))
    assert gradcheck(layer, inputs)
    assert gradgradcheck(layer, inputs)


@pytest.mark.parametrize(("mode", "distinct"), [("row", 2), ("batch", 1)])
def test_stochastic_depth_drops_samples_or_batches_and_keeps_the_mean(mode: str, distinct: int) -> None:
    layer = replaced(StochasticDepth(0.25, mode).train())
    torch.manual_seed(0)
    outputs = torch.stack([layer(torch.ones(50, 2, 3)) for _ in range(200)])
    torch.testing.assert_close(outputs.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(float(outputs.mean()) - 1) < 0.1
    assert max(len(own.unique()) for own in outputs) == distinct
    assert torch.equal(layer.eval()(torch.ones(5, 2)), torch.ones(5, 2))


@pytest.mark.parametrize(("p", "value"), [(0.0, 1.0), (1.0, 0.0)])
def test_stochastic_depth_of_none_or_all(p: float, value: float) -> None:
    layer = replaced(StochasticDepth(p, "row").train())
    assert torch.equal(layer(torch.ones(3, 2)), torch.full((3, 2), value))


def test_clients_of_a_cohort_drop_other_samples() -> None:
    layer = replaced(StochasticDepth(0.5, "row").train())
    torch.manual_seed(0)
    outputs = torch.vmap(layer, randomness="different")(torch.ones(2, 40, 1))
    assert not torch.equal(outputs[0], outputs[1])


def test_others_stay_as_they_are() -> None:
    class Mine(nn.Hardsigmoid):
        """A subclass may do anything."""

    assert replacement_of(nn.ReLU()) is None and replacement_of(Mine()) is None


@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.Hardswish, nn.Identity])
@pytest.mark.parametrize("training", [False, True])
def test_timm_s_batch_norm_keeps_its_activation(act_layer: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    layer = BatchNormAct2d(3, act_layer=act_layer)
    nn.init.normal_(layer.weight)
    converted = convert_batchnorm(layer).train(training)
    assert isinstance(converted, MixedBatchNorm2d)
    converted.beta.fill_(1.0 if training else 0.0)
    inputs = torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(layer).train(training)(inputs.clone())
    torch.testing.assert_close(converted(inputs.clone()), expected, atol=1e-5, rtol=1e-5)


vision = torchvision.models
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3": lambda: vision.mobilenet_v3_small(num_classes=4),
    "efficientnet": lambda: vision.efficientnet_b0(num_classes=4),
    "vision transformer": lambda: vision.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=4),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
    "timm regnet": lambda: timm.create_model("regnety_002", num_classes=4),
    "timm lcnet": lambda: timm.create_model("lcnet_050", num_classes=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_predict_the_same_after_conversion(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(convert_batchnorm(model)(inputs), model(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives_pass_models(name: str) -> None:
    """A directional second derivative under vmap, against finite differences in float64."""
    torch.manual_seed(0)
    module = convert_batchnorm(seeded(MODELS[name])).requires_grad_(False)
    model = FunctionalModel.of(module)
    parameters, buffers = model.tensors()
    beta = torch.full((len(batchnorm_names(module)),), 0.5, dtype=torch.float64)
    batch = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 3])
    direction = {n: torch.randn_like(p) / p.numel() for n, p in parameters.items()}
    for layer in module.modules():  # the two sides of the difference would draw other zeros
        if hasattr(layer, "p"):
            layer.p = 0.0

    def gradient(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda p: model.loss(p, buffers, beta, batch, training=True)[0])(parameters)

    def product(scale: Tensor) -> Tensor:
        along = {n: scale * d for n, d in direction.items()}
        moved = torch.func.jvp(gradient, (parameters,), (along,))[1]
        return torch.stack([(moved[n] * direction[n]).sum() for n in moved]).sum()

    found = torch.vmap(product, randomness="different")(torch.ones(1, dtype=torch.float64))[0]
    step = 1e-6
    sides = [gradient({n: p + side * step * direction[n] for n, p in parameters.items()}) for side in (1, -1)]
    expected = sum(float(((sides[0][n] - sides[1][n]) * direction[n]).sum()) for n in direction) / (2 * step)
    assert float(found) == pytest.approx(expected, rel=1e-3, abs=1e-9)
