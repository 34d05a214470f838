"""Nets on disk and back, for the model that they fit."""

from pathlib import Path

import pytest
import torch
from core_cases import ConvNet, image_batches, seeded
from torch import nn

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.statistics import collect_statistics
from fedl2p.errors import ModelError
from fedl2p.io import write_tensors
from fedl2p.policy.files import load_policy, policy_metadata


def stored(path: Path, model: nn.Module, **options: bool) -> MetaNets:
    nets = MetaNets(model, base_lr=0.07, **options)
    moments = torch.rand(5, 2 * len(nets.layer_names))
    nets.standardize(torch.rand(5, len(nets.batchnorm_names)), moments, torch.arange(1.0, 6.0))
    write_tensors(path, dict(nets.state_dict()), policy_metadata(nets))
    return nets


def convolutional(classes: int = 3) -> nn.Module:
    return convert_batchnorm(seeded(lambda: ConvNet(classes=classes)).float())


@pytest.mark.parametrize(
    "options", [{}, {"log_divergence": False}, {"log_divergence": True, "sample_count": True}], ids=str
)
def test_loaded_nets_give_the_same_recipe(tmp_path: Path, options: dict[str, bool]) -> None:
    model = convolutional()
    nets = stored(tmp_path / "nets.safetensors", model, **options)
    loaded = load_policy(tmp_path / "nets.safetensors", model)
    batches = [(x.float(), y) for x, y in image_batches(6)]
    statistics = collect_statistics(model, batches)
    for now, then in zip(loaded.recipe(statistics), nets.recipe(statistics), strict=True):
        # Loaded tensors may be aligned otherwise, and products then rounded otherwise.
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-7)
    assert loaded.base_lr.tolist() == pytest.approx([0.07] * len(nets.parameter_names))


def test_a_model_without_batch_norm_has_a_policy_too(tmp_path: Path) -> None:
    model = convert_batchnorm(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    stored(tmp_path / "nets.safetensors", model)
    loaded = load_policy(tmp_path / "nets.safetensors", model)
    assert loaded.bn_net is None
    assert loaded.parameter_names == ("0.weight", "0.bias", "2.weight", "2.bias")


def test_another_number_of_channels_or_classes_is_the_same_policy(tmp_path: Path) -> None:
    stored(tmp_path / "nets.safetensors", convolutional())
    load_policy(tmp_path / "nets.safetensors", convolutional(classes=7))


def test_nets_for_another_model_are_refused_with_a_layer_that_differs(tmp_path: Path) -> None:
    stored(tmp_path / "nets.safetensors", convolutional())
    other = convert_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    with pytest.raises(ModelError, match=r"another model; batchnorm_names differ, among them .*'bn1'"):
        load_policy(tmp_path / "nets.safetensors", other)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "nets.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot be read.*nets\.safetensors"):
        load_policy(path, convolutional())


def test_nets_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    model = convolutional()
    nets = MetaNets(model)
    tensors = dict(nets.state_dict())
    del tensors["base_lr"]
    write_tensors(tmp_path / "nets.safetensors", tensors, policy_metadata(nets))
    with pytest.raises(ModelError, match="base_lr"):
        load_policy(tmp_path / "nets.safetensors", model)
