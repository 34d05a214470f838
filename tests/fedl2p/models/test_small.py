"""SmallConvNet: shapes, layers, and that the core takes it as it is."""

import pytest
import torch
from core_cases import randomize
from torch import nn

from fedl2p.core.batchnorm import batchnorm_names, convert_batchnorm
from fedl2p.core.statistics import learnable_layer_names
from fedl2p.models import SmallConvNet


@pytest.mark.parametrize(("channels", "classes", "widths", "size"), [(1, 10, (16, 32, 32), 8), (3, 4, (5,), 1)])
def test_images_of_any_size_to_logits(channels: int, classes: int, widths: tuple[int, ...], size: int) -> None:
    model = SmallConvNet(in_channels=channels, num_classes=classes, widths=widths).eval()
    for side in (size, size + 5):
        assert model(torch.randn(2, channels, side, side + 1)).shape == (2, classes)


def test_each_convolution_after_the_first_halves_the_resolution() -> None:
    model = SmallConvNet(widths=(4, 6, 8))
    shapes = []
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    model(torch.randn(2, 1, 8, 12))
    assert shapes == [(4, 8, 12), (6, 4, 6), (8, 2, 3)]


def test_layers_in_definition_order() -> None:
    converted = convert_batchnorm(SmallConvNet())
    assert batchnorm_names(converted) == ("features.1", "features.4", "features.7")
    assert learnable_layer_names(converted) == (
        *("features.0", "features.1", "features.3", "features.4", "features.6", "features.7"),
        "head",
    )
    assert len(list(converted.parameters())) == 11


def test_conversion_keeps_predictions() -> None:
    model = randomize(SmallConvNet(in_channels=2, num_classes=3)).eval()
    x = torch.randn(4, 2, 8, 8)
    torch.testing.assert_close(convert_batchnorm(model)(x), model(x), rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_gradient() -> None:
    model = SmallConvNet(widths=(3, 4))
    nn.functional.cross_entropy(model(torch.randn(5, 1, 6, 6)), torch.arange(5)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
