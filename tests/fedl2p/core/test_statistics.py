"""collect_statistics: one streaming pass gives what numpy gives on all activations, and leaves the model alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import ConvNet, PictureAndAge, close, image_batches, named_inputs_case, seeded
from torch import Tensor, nn

from fedl2p.core.batchnorm import MixedBatchNorm, convert_batchnorm
from fedl2p.core.statistics import collect_statistics, learnable_layer_names, symmetric_kl
from fedl2p.errors import DataError


@pytest.fixture
def model() -> nn.Module:
    return convert_batchnorm(seeded(ConvNet))


def activations(model: nn.Module, inputs: Tensor) -> dict[str, np.ndarray]:
    """The input of every learnable layer of the pretrained model, recorded independently."""
    seen: dict[str, np.ndarray] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: seen.update({name: args[0].detach().numpy().copy()})
        )
        for name in learnable_layer_names(model)
    ]
    model.eval()(inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_ragged_batches_equal_one_batch(model: nn.Module) -> None:
    inputs = image_batches(13)[0][0]
    ragged = collect_statistics(model, inputs.split([5, 1, 4, 3]))
    whole = collect_statistics(model, [inputs])
    assert ragged.num_samples == whole.num_samples == 13
    close(ragged.bn_divergence, whole.bn_divergence, 1e-12)
    close(ragged.layer_moments, whole.layer_moments, 1e-12)
    for name in whole.channel_mean:
        close(ragged.channel_mean[name], whole.channel_mean[name], 1e-12)
        close(ragged.channel_var[name], whole.channel_var[name], 1e-12)


def test_everything_equals_numpy_on_the_concatenated_activations(model: nn.Module) -> None:
    batches = image_batches(5, 2, 6)
    statistics = collect_statistics(model, batches)
    seen = activations(model, torch.cat([x for x, _ in batches]))
    assert list(seen) == ["conv1", "bn1", "conv2", "bn2", "fc"]
    expected = [v for a in seen.values() for v in (a.mean(), np.sqrt(a.var(ddof=1) + 1e-5))]
    np.testing.assert_allclose(statistics.layer_moments.numpy(), expected, rtol=1e-12)
    for index, name in enumerate(("bn1", "bn2")):
        rows = np.moveaxis(seen[name], 1, -1).reshape(-1, seen[name].shape[1])
        mean, var = rows.mean(0), rows.var(0, ddof=1)
        np.testing.assert_allclose(statistics.channel_mean[name].numpy(), mean, rtol=1e-12)
        np.testing.assert_allclose(statistics.channel_var[name].numpy(), var, rtol=1e-12)
        layer = model.get_submodule(name)
        a, b = var + layer.eps, layer.pretrained_var.numpy() + layer.eps
        d2 = (mean - layer.pretrained_mean.numpy()) ** 2
        forward = 0.5 * (np.log(b / a) + (a + d2) / b - 1)
        backward = 0.5 * (np.log(a / b) + (b + d2) / a - 1)
        np.testing.assert_allclose(statistics.bn_divergence[index], ((forward + backward) / 2).mean(), rtol=1e-12)


def test_xi_of_one_layer_by_hand() -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(2, eps=0.5).double())
    data = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    # Channel 0: mean 1, unbiased variance 2, so a = 2.5, b = 1.5, d = 1. Channel 1: mean 1, variance 0: a = 0.5.
    first = (2.5 / 1.5 + 1.5 / 2.5 - 2 + (1 / 2.5 + 1 / 1.5)) / 4
    second = (0.5 / 1.5 + 1.5 / 0.5 - 2 + (1 / 0.5 + 1 / 1.5)) / 4
    statistics = collect_statistics(layer, [data])
    assert float(statistics.bn_divergence[0]) == pytest.approx((first + second) / 2, rel=1e-12)
    assert statistics.channel_var[""].tolist() == [2.0, 0.0]
    assert statistics.layer_moments.tolist() == pytest.approx([1.0, (2 / 3 + 1e-5) ** 0.5], rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm1d, (6, 3, 4)), (nn.BatchNorm3d, (4, 3, 2, 1, 2))],
)
def test_channels_of_every_kind_of_layer(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    data = torch.randn(shape, dtype=torch.float64)
    statistics = collect_statistics(convert_batchnorm(kind(3).double()), data.split(2))
    rows = data.movedim(1, -1).reshape(-1, 3)
    close(statistics.channel_mean[""], rows.mean(0), 1e-12)
    close(statistics.channel_var[""], rows.var(0), 1e-12)


def test_symmetric_kl_by_hand_symmetric_and_zero_at_equality() -> None:
    mean, var, other_mean, other_var = (torch.tensor(v).double() for v in ([1.0], [3.0], [-1.0], [0.5]))
    expected = (4 / 1.5 + 1.5 / 4 - 2 + 4 * (1 / 4 + 1 / 1.5)) / 4
    assert float(symmetric_kl(mean, var, other_mean, other_var, 1.0)) == pytest.approx(expected, rel=1e-12)
    swapped = symmetric_kl(other_mean, other_var, mean, var, 1.0)
    assert float(swapped) == pytest.approx(expected, rel=1e-12)
    same = symmetric_kl(mean, var, mean, var, 1.0)
    assert same.shape == ()
    assert same == 0


def test_symmetric_kl_is_that_of_torch_distributions() -> None:
    a, b = torch.rand(2, 4).double() + 0.2, torch.rand(2, 4).double() + 0.2
    p = torch.distributions.Normal(a[0], a[1].sqrt())
    q = torch.distributions.Normal(b[0], b[1].sqrt())
    kl = torch.distributions.kl_divergence
    close(symmetric_kl(a[0], a[1], b[0], b[1], 0.0), ((kl(p, q) + kl(q, p)) / 2).mean(), 1e-12)


def fingerprint(model: nn.Module) -> list[Any]:
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return [hooks, [m.training for m in model.modules()], {n: t.clone() for n, t in model.state_dict().items()}]


def same(before: list[Any], after: list[Any]) -> bool:
    return before[:2] == after[:2] and all(torch.equal(t, after[2][n]) for n, t in before[2].items())


def odd_modes(model: nn.Module) -> list[Any]:
    """Beta 0.7 and a mixture of modes: what must be found again."""
    model.train()
    model.bn2.eval()
    for layer in model.modules():
        if isinstance(layer, MixedBatchNorm):
            layer.beta = torch.full_like(layer.beta, 0.7)
            layer.running_mean = layer.running_mean + 1
    return fingerprint(model)


def test_the_model_is_left_as_it_was_and_its_own_beta_does_not_count(model: nn.Module) -> None:
    batches = image_batches(4, 3)
    reference = collect_statistics(model, batches)
    before = odd_modes(model)
    statistics = collect_statistics(model, batches)
    assert same(before, fingerprint(model))
    assert torch.equal(statistics.layer_moments, reference.layer_moments)
    assert torch.equal(statistics.bn_divergence, reference.bn_divergence)


def test_the_model_is_left_as_it_was_when_the_data_raise(model: nn.Module) -> None:
    def broken() -> Iterator[Tensor]:
        yield image_batches(4)[0][0]
        raise OSError("the disk is gone")

    before = odd_modes(model)
    with pytest.raises(OSError, match="the disk is gone"):
        collect_statistics(model, broken())
    assert same(before, fingerprint(model))


def test_no_gradient_is_recorded(model: nn.Module) -> None:
    statistics = collect_statistics(model, image_batches(4))
    tensors = [statistics.bn_divergence, statistics.layer_moments, *statistics.channel_mean.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_no_data_is_an_error(model: nn.Module) -> None:
    with pytest.raises(DataError, match="at least one sample"):
        collect_statistics(model, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_an_error_that_names_the_first_layer(model: nn.Module, value: float) -> None:
    inputs = image_batches(4)[0][0].clone()
    inputs[2, 0, 1, 1] = value
    with pytest.raises(DataError, match="'conv1'"):
        collect_statistics(model, [inputs])


def test_a_single_sample_has_finite_statistics(model: nn.Module) -> None:
    statistics = collect_statistics(model, image_batches(1))
    assert torch.isfinite(statistics.bn_divergence).all()
    assert statistics.num_samples == 1


def test_a_large_offset_keeps_the_variance_accurate_in_float32() -> None:
    data = (1e4 + 0.05 * torch.randn(600, 2)).float()
    statistics = collect_statistics(convert_batchnorm(nn.BatchNorm1d(2)), data.split(37))
    exact = data.double().var(0)
    torch.testing.assert_close(statistics.channel_var[""].double(), exact, rtol=1e-6, atol=0)
    assert float(statistics.layer_moments[1]) == pytest.approx(float((data.double().var() + 1e-5).sqrt()), rel=1e-6)
    assert statistics.channel_mean[""].dtype == torch.float32


def test_a_layer_that_is_never_reached_gives_zeros() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(3, 2)
            self.unused = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)

    statistics = collect_statistics(convert_batchnorm(Unused()), [torch.randn(4, 3)])
    assert statistics.layer_moments[2:].tolist() == [0.0, 0.0]
    assert statistics.layer_moments[1] > 0


def test_a_layer_that_is_reached_twice_counts_both_inputs() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(self.linear(inputs))

    model = convert_batchnorm(Again().double())
    inputs = torch.randn(5, 2, dtype=torch.float64)
    both = torch.cat([inputs, model.linear(inputs)]).detach()
    moments = collect_statistics(model, [inputs]).layer_moments
    close(moments, torch.stack([both.mean(), (both.var() + 1e-5).sqrt()]), 1e-12)


def test_tensors_and_pairs_give_the_same(model: nn.Module) -> None:
    batches = image_batches(4, 3)
    pairs = collect_statistics(model, batches)
    assert torch.equal(pairs.layer_moments, collect_statistics(model, [x for x, _ in batches]).layer_moments)
    assert torch.equal(pairs.layer_moments, collect_statistics(model, [[x, y] for x, y in batches]).layer_moments)


def test_a_dict_or_a_tuple_of_inputs_is_measured_as_the_model_takes_it() -> None:
    named, positional = named_inputs_case().train, named_inputs_case(by_name=False).train
    model = convert_batchnorm(seeded(PictureAndAge))
    expected = collect_statistics(model, positional)
    pictures = collect_statistics(model.net, [x[0] for x, _ in positional])
    assert torch.equal(expected.channel_mean["net.bn1"], pictures.channel_mean["bn1"])
    ages = torch.cat([x[1] for x, _ in positional])
    close(expected.channel_mean["bn3"], torch.cat([ages, ages**2], 1).mean(0), 1e-12)
    close(expected.channel_var["bn3"], torch.cat([ages, ages**2], 1).var(0), 1e-12)
    for batches in (named, [inputs for inputs, _ in named], [[inputs, targets] for inputs, targets in named]):
        found = collect_statistics(model, batches)
        assert found.num_samples == expected.num_samples == 15
        assert torch.equal(found.layer_moments, expected.layer_moments)
        assert torch.equal(found.bn_divergence, expected.bn_divergence)
