"""BNNet, LRNet and the straight-through clamp (Eq. 4, Appendix E)."""

import pytest
import torch
from core_cases import ConvNet, close, seeded
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.functional import FunctionalModel
from fedl2p.core.meta_nets import MetaNet, MetaNets, straight_through_clamp
from fedl2p.core.statistics import collect_statistics
from fedl2p.errors import ConfigError, ModelError


@pytest.fixture
def module() -> nn.Module:
    return convert_batchnorm(seeded(ConvNet))


def clamp(values: Tensor) -> Tensor:
    return straight_through_clamp(values, 0.0, 1.0)


VALUES = torch.tensor([-3.0, -1e-30, 0.0, 0.25, 1.0, 1.0001, 7.0], dtype=torch.float64)
CLAMPED = torch.tensor([0.0, 0.0, 0.0, 0.25, 1.0, 1.0, 1.0], dtype=torch.float64)


def test_clamp_values_are_exact_at_the_ends() -> None:
    assert torch.equal(clamp(VALUES), CLAMPED)
    assert torch.equal(straight_through_clamp(VALUES, -1.0, 5.0), VALUES.clamp(-1, 5))


def test_clamp_gradient_passes_straight_through() -> None:
    values = VALUES.clone().requires_grad_()
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((clamp(values) * weights).sum(), values)
    assert torch.equal(gradient, weights)
    assert torch.equal(grad(lambda v: (clamp(v) * weights).sum())(VALUES), weights)


def test_clamp_under_vjp_and_jvp() -> None:
    tangent = torch.arange(1.0, 8.0, dtype=torch.float64)
    outputs, pull_back = vjp(clamp, VALUES)
    assert torch.equal(outputs, CLAMPED)
    assert torch.equal(pull_back(tangent)[0], tangent)
    outputs, pushed = jvp(clamp, (VALUES,), (tangent,))
    assert torch.equal(outputs, CLAMPED)
    assert torch.equal(pushed, tangent)


def test_clamp_under_vmap_of_values_gradients_and_tangents() -> None:
    stacked = torch.stack([VALUES, VALUES.flip(0)])
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    assert torch.equal(torch.vmap(clamp)(stacked), torch.stack([CLAMPED, CLAMPED.flip(0)]))
    gradients = torch.vmap(grad(lambda v: (clamp(v) * weights).sum()))(stacked)
    assert torch.equal(gradients, weights.expand(2, 7))
    pushed = torch.vmap(lambda v: jvp(clamp, (v,), (weights,))[1])(stacked)
    assert torch.equal(pushed, weights.expand(2, 7))
    pulled = torch.vmap(lambda v: vjp(clamp, v)[1](weights)[0])(stacked)
    assert torch.equal(pulled, weights.expand(2, 7))


def test_shapes_and_names_are_in_definition_order(module: nn.Module) -> None:
    nets = MetaNets(module)
    assert nets.batchnorm_names == ("bn1", "bn2")
    assert nets.layer_names == ("conv1", "bn1", "conv2", "bn2", "fc")
    assert nets.parameter_names == FunctionalModel.of(module).parameter_names
    assert nets.parameter_names[:3] == ("conv1.weight", "bn1.weight", "bn1.bias")
    assert [tuple(layer.weight.shape) for layer in nets.bn_net.layers] == [(100, 2), (100, 100), (2, 100)]
    assert [tuple(layer.weight.shape) for layer in nets.lr_net.layers] == [(100, 10), (100, 100), (9, 100)]
    beta, eta = nets(torch.rand(4, 2), torch.rand(4, 10))
    assert (beta.shape, eta.shape, nets.base_lr.shape) == ((4, 2), (4, 9), (9,))


def test_paper_nets_start_near_one_half_and_one(module: nn.Module) -> None:
    nets = MetaNets(module, initialization="paper", base_lr=0.01)
    beta, eta = nets(torch.rand(2), torch.rand(10))
    assert (beta - 0.5).abs().max() < 0.25
    assert (eta / 0.01 - 1).abs().max() < 0.5
    for net, bias in ((nets.bn_net, 0.5), (nets.lr_net, 1.0)):
        for layer in net.layers:
            assert torch.equal(layer.bias, torch.full_like(layer.bias, bias))
            expected = 0.1 * (2 / sum(layer.weight.shape)) ** 0.5
            assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.3)


def test_initial_beta_and_base_lr_are_what_untrained_responsive_nets_answer_on_average(module: nn.Module) -> None:
    torch.manual_seed(1)
    answers = [
        MetaNets(module, initial_beta=0.3, base_lr=0.02)(torch.rand(30, 2), torch.rand(30, 10)) for _ in range(9)
    ]
    assert float(torch.cat([a.beta for a in answers]).detach().mean()) == pytest.approx(0.3, abs=0.08)
    assert float(torch.cat([a.eta for a in answers]).detach().mean()) == pytest.approx(0.02, rel=0.25)


def test_responsive_nets_react_far_more_to_their_inputs(module: nn.Module) -> None:
    xi, moments = torch.randn(64, 2).exp(), torch.randn(64, 10)
    spread = {}
    for kind in ("paper", "responsive"):
        nets = MetaNets(module, initialization=kind, base_lr=1.0)
        nets.standardize(xi, moments)
        beta, eta = nets(xi, moments)
        spread[kind] = (float(beta.detach().std(0).mean()), float(eta.detach().std(0).mean()))
    assert spread["responsive"][0] > 20 * spread["paper"][0]
    assert spread["responsive"][1] > 20 * spread["paper"][1]


def test_outputs_stay_in_their_ranges_with_exact_ends_and_still_learn(module: nn.Module) -> None:
    nets = MetaNets(module, base_lr=1.0)
    with torch.no_grad():
        nets.bn_net.layers[-1].bias.copy_(torch.tensor([-50.0, 50.0]))
        nets.lr_net.layers[-1].bias.fill_(-50.0)
        nets.lr_net.layers[-1].bias[0] = 1e5
    beta, eta = nets(torch.rand(2), torch.rand(10))
    assert beta.tolist() == [0.0, 1.0]
    assert eta.tolist() == [1000.0] + [0.0] * 8
    (beta.sum() + eta.sum()).backward()
    assert torch.equal(nets.bn_net.layers[-1].bias.grad, torch.ones(2))
    assert torch.equal(nets.lr_net.layers[-1].bias.grad, torch.ones(9))


def test_eta_may_be_negative(module: nn.Module) -> None:
    eta = MetaNets(module, base_lr=-0.01, initialization="paper")(torch.rand(2), torch.rand(10)).eta
    assert (eta < 0).all()


def test_a_model_without_batch_norm_has_no_bn_net() -> None:
    module = convert_batchnorm(nn.Linear(3, 2))
    nets = MetaNets(module)
    assert nets.bn_net is None
    assert not any(name.startswith("bn_net") for name, _ in nets.named_parameters())
    statistics = collect_statistics(module, [torch.randn(5, 3)])
    nets.standardize(torch.zeros(4, 0), torch.rand(4, 2))
    beta, eta = nets.recipe(statistics)
    assert (beta.shape, eta.shape) == ((0,), (2,))


def test_recipe_is_forward_without_a_gradient(module: nn.Module) -> None:
    nets = MetaNets(module).double()
    statistics = collect_statistics(module, [torch.randn(6, 1, 4, 4, dtype=torch.float64)])
    recipe = nets.recipe(statistics)
    assert not recipe.beta.requires_grad
    assert not recipe.eta.requires_grad
    beta, eta = nets(statistics.bn_divergence, statistics.layer_moments)
    assert torch.equal(recipe.beta, beta)
    assert torch.equal(recipe.eta, eta)


def test_standardize_gives_inputs_of_mean_0_and_sd_1_and_leaves_constant_ones_their_scale(module: nn.Module) -> None:
    nets = MetaNets(module)
    xi = torch.randn(50, 2).exp() * torch.tensor([1.0, 300.0])
    moments = 1e3 + torch.randn(50, 10) * torch.logspace(-1, 3, 10)
    moments[:, 3] = 1234.5
    nets.standardize(xi, moments)
    for net, raw in ((nets.bn_net, torch.log1p(xi)), (nets.lr_net, moments)):
        z = ((raw - net.input_shift) / net.input_scale).double()
        varying = raw.std(0) > 0
        assert z.mean(0).abs().max() < 1e-2
        torch.testing.assert_close(
            z.std(0, correction=0)[varying], torch.ones(int(varying.sum())).double(), rtol=1e-3, atol=0
        )
    assert nets.lr_net.input_scale[3] == 1
    assert nets.lr_net.input_shift[3] == 1234.5


def test_standardize_with_a_single_client_has_scale_1(module: nn.Module) -> None:
    nets = MetaNets(module)
    nets.standardize(torch.rand(1, 2), torch.rand(1, 10))
    assert torch.equal(nets.bn_net.input_scale, torch.ones(2))
    assert torch.equal(nets.lr_net.input_scale, torch.ones(10))


def test_without_standardize_the_paper_sees_raw_inputs(module: nn.Module) -> None:
    nets = MetaNets(module, initialization="paper", log_divergence=False).double()
    xi = torch.rand(2).double()
    hidden = xi
    for layer in nets.bn_net.layers[:-1]:
        hidden = torch.relu(hidden @ layer.weight.T + layer.bias)
    expected = hidden @ nets.bn_net.layers[-1].weight.T + nets.bn_net.layers[-1].bias
    close(nets.bn_net(xi), expected, 1e-12)
    logged = MetaNets(module, initialization="paper", log_divergence=True).double()
    logged.load_state_dict(nets.state_dict())
    close(logged.bn_net(xi), nets.bn_net(torch.log1p(xi)), 1e-12)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_an_initial_beta_outside_0_to_1_is_an_error(module: nn.Module, value: float) -> None:
    with pytest.raises(ConfigError, match="initial_beta"):
        MetaNets(module, initial_beta=value)


def test_an_unknown_initialization_and_a_model_without_parameters_are_errors(module: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"'zeros'.*'paper' and 'responsive'"):
        MetaNets(module, initialization="zeros")
    with pytest.raises(ModelError, match="no parameters"):
        MetaNets(nn.ReLU())


def test_state_dict_round_trip_keeps_shift_and_scale(module: nn.Module) -> None:
    nets, other = MetaNets(module), MetaNets(module, base_lr=0.5)
    nets.standardize(torch.rand(5, 2), torch.rand(5, 10))
    other.load_state_dict(nets.state_dict())
    xi, moments = torch.rand(3, 2), torch.rand(3, 10)
    for a, b in zip(nets(xi, moments), other(xi, moments), strict=True):
        assert torch.equal(a, b)
    assert "lr_net.input_scale" in nets.state_dict()
    assert "lr_net.input_scale" not in dict(nets.named_parameters())


def test_a_net_is_vectorized_over_clients() -> None:
    net = MetaNet(3, 4, initial_output=0.5, output_range=(0.0, 1.0)).double()
    inputs = torch.randn(6, 3).double()
    close(net(inputs), torch.stack([net(row) for row in inputs]), 1e-12)
    close(torch.vmap(net)(inputs), net(inputs), 1e-12)


def test_nets_may_read_the_number_of_samples() -> None:
    torch.manual_seed(0)
    nets = MetaNets(convert_batchnorm(ConvNet()), sample_count=True)
    xi, moments = torch.rand(3, 2), torch.rand(3, 10)
    nets.standardize(xi, moments, torch.tensor([8.0, 16.0, 32.0]))
    few, many = (nets(xi[0], moments[0], torch.tensor(count)) for count in (8.0, 32.0))
    assert not torch.equal(few.beta, many.beta)
    assert not torch.equal(few.eta, many.eta)
    torch.testing.assert_close(nets.lr_net.input_shift[-1], torch.tensor(16.0).log())
    with pytest.raises(ModelError, match="num_samples"):
        nets(xi[0], moments[0])


def test_without_the_option_the_number_of_samples_changes_nothing() -> None:
    nets = MetaNets(convert_batchnorm(ConvNet()))
    xi, moments = torch.rand(2), torch.rand(10)
    assert torch.equal(nets(xi, moments).eta, nets(xi, moments, torch.tensor(5.0)).eta)
