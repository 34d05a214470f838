"""MixedBatchNorm and convert_batchnorm: Eq. 2, running statistics, conversion of any model, derivatives."""

import copy
import warnings

import pytest
import torch
import torchvision
from core_cases import ConvNet, randomize, seeded
from torch import Tensor, nn
from torch.func import functional_call

from fedl2p.core.batchnorm import FUNCTIONAL, FUSED, ForwardMode, MixedBatchNorm, batchnorm_names, convert_batchnorm
from fedl2p.core.finetune import finetune
from fedl2p.core.functional import FunctionalModel, InnerState
from fedl2p.core.statistics import collect_statistics, learnable_layer_names
from fedl2p.errors import ModelError

KINDS = [(nn.BatchNorm1d, (5, 3)), (nn.BatchNorm1d, (5, 3, 4)), (nn.BatchNorm2d, (5, 3, 2, 2))]
KINDS += [(nn.BatchNorm3d, (5, 3, 2, 2, 2))]


def set_beta(model: nn.Module, value: float) -> None:
    for module in model.modules():
        if isinstance(module, MixedBatchNorm):
            module.beta = torch.full_like(module.beta, value)


def plain(kind: type[nn.Module] = nn.BatchNorm2d, **options: object) -> nn.Module:
    return randomize(kind(3, **options).double(), 1)


def data(*shape: int, seed: int = 0) -> Tensor:
    return 2 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict({"norm": nn.BatchNorm1d(3), "act": nn.Tanh()})
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3))), inner])
        self.head = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.blocks[0](inputs)
        return self.head(self.blocks[1]["act"](self.blocks[1]["norm"](hidden)))


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_beta_0_predicts_as_before_with_the_layer_as_root(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    layer = plain(kind).eval()
    mixed = convert_batchnorm(layer)
    assert isinstance(mixed, MixedBatchNorm)
    torch.testing.assert_close(mixed(data(*shape)), layer(data(*shape)), rtol=1e-12, atol=1e-12)


def test_every_depth_is_converted_in_definition_order_and_predicts_as_before() -> None:
    model = seeded(Nested).eval()
    converted = convert_batchnorm(model)
    assert batchnorm_names(converted) == ("blocks.0.1.0", "blocks.1.norm")
    assert not any(type(m) is nn.BatchNorm1d for m in converted.modules())
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in model.named_parameters()]
    torch.testing.assert_close(converted(data(6, 3)), model(data(6, 3)), rtol=1e-12, atol=1e-12)


def test_float32_predictions_are_unchanged_to_1e_6() -> None:
    model = seeded(ConvNet).float().eval()
    x = data(4, 1, 4, 4).float()
    torch.testing.assert_close(convert_batchnorm(model)(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_client_statistics_equal_to_the_pretrained_leave_predictions_unchanged_for_any_beta(beta: float) -> None:
    model = seeded(ConvNet).eval()
    converted = convert_batchnorm(model)
    set_beta(converted, beta)
    x = data(4, 1, 4, 4)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "shape"), KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_training_mode_is_equation_2_with_the_biased_variance(
    kind: type[nn.Module], shape: tuple[int, ...], beta: float
) -> None:
    layer, x = plain(kind), data(*shape)
    mixed = convert_batchnorm(layer).train()
    set_beta(mixed, beta)
    rows = x.movedim(1, -1).reshape(-1, 3)
    mean = (1 - beta) * layer.running_mean + beta * rows.sum(0) / len(rows)
    var = (1 - beta) * layer.running_var + beta * ((rows - rows.mean(0)) ** 2).sum(0) / len(rows)
    expected = layer.weight * (x.movedim(1, -1) - mean) / (var + layer.eps).sqrt() + layer.bias
    torch.testing.assert_close(mixed(x), expected.movedim(-1, 1), rtol=1e-11, atol=1e-11)


def test_evaluation_mode_mixes_running_with_pretrained_statistics() -> None:
    layer, x = plain(), data(5, 3, 2, 2)
    mixed = convert_batchnorm(layer).eval()
    set_beta(mixed, 0.25)
    mixed.running_mean, mixed.running_var = mixed.running_mean + 1, mixed.running_var * 2
    mean, var = layer.running_mean + 0.25, layer.running_var * 1.25
    expected = nn.functional.batch_norm(x, mean, var, layer.weight, layer.bias, False, 0.0, layer.eps)
    torch.testing.assert_close(mixed(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, None])
def test_running_statistics_and_beta_1_follow_torch_over_several_training_batches(momentum: float | None) -> None:
    layer = plain(momentum=momentum).train()
    mixed = convert_batchnorm(layer)
    set_beta(mixed, 1.0)
    for step in range(4):
        x = data(5 + step, 3, 2, 2, seed=step)
        torch.testing.assert_close(mixed(x), layer(x), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(mixed.running_mean, layer.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mixed.running_var, layer.running_var, rtol=1e-12, atol=1e-12)
    if momentum is None:
        assert mixed.num_batches_tracked == layer.num_batches_tracked == 7
    torch.testing.assert_close(mixed.eval()(x), layer.eval()(x), rtol=1e-11, atol=1e-11)


def test_running_statistics_do_not_depend_on_beta_and_the_old_tensors_are_not_written_to() -> None:
    layer, x = plain(), data(5, 3, 2, 2)
    results = []
    for beta in (0.0, 1.0):
        mixed = convert_batchnorm(layer).train()
        set_beta(mixed, beta)
        old, before = mixed.running_mean, mixed.running_mean.clone()
        mixed(x)
        assert torch.equal(old, before)
        assert torch.equal(mixed.pretrained_mean, before)
        results.append((mixed.running_mean, mixed.running_var))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_in_ordinary_use_the_running_statistics_keep_no_graph_and_do_not_differ() -> None:
    x, results = data(5, 3, 2, 2).requires_grad_(), []
    for differentiable in (False, True):
        mixed = convert_batchnorm(plain()).train()
        mixed.forward_mode = ForwardMode(differentiable_statistics=differentiable)
        mixed(x)
        assert mixed.running_mean.requires_grad is mixed.running_var.requires_grad is differentiable
        results.append((mixed.running_mean, mixed.running_var))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_affine_false_has_no_parameters_and_predicts_as_before() -> None:
    layer = plain(affine=False)
    mixed = convert_batchnorm(layer)
    assert not list(mixed.parameters())
    x = data(4, 3, 2, 2)
    torch.testing.assert_close(mixed.eval()(x), layer.eval()(x), rtol=1e-12, atol=1e-12)
    set_beta(mixed, 1.0)
    torch.testing.assert_close(mixed.train()(x), layer.train()(x), rtol=1e-12, atol=1e-12)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.linear(self.first(inputs))))


def test_a_module_in_two_places_is_converted_once_and_behaves_as_before() -> None:
    model = seeded(Twice)
    converted = convert_batchnorm(model)
    assert converted.first is converted.second
    assert batchnorm_names(converted) == ("first",)
    x = data(6, 3)
    torch.testing.assert_close(converted.eval()(x), model.eval()(x), rtol=1e-12, atol=1e-12)
    set_beta(converted, 1.0)
    torch.testing.assert_close(converted.train()(x), model.train()(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(converted.first.running_var, model.first.running_var, rtol=1e-12, atol=1e-12)


def test_a_module_in_two_places_is_one_also_in_the_functional_model() -> None:
    module = convert_batchnorm(seeded(Twice))
    model = FunctionalModel.of(module)
    parameters, buffers = model.tensors()
    moved = {name: p + 0.1 for name, p in parameters.items()}
    x, one = data(6, 3), torch.ones(1, dtype=torch.float64)
    outputs, after = model(moved, buffers, one, x, training=True)
    reference = seeded(Twice).train()
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1)
    torch.testing.assert_close(outputs, reference(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(after["first.running_mean"], reference.first.running_mean, rtol=1e-12, atol=1e-12)


class OwnNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.SyncBatchNorm(3), "SyncBatchNorm"),
        (OwnNorm(3), "OwnNorm"),
        (nn.BatchNorm2d(3, track_running_stats=False), "track_running_stats"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(layer: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=rf"'block\.norm'.*{words}"):
        convert_batchnorm(named(layer))


def named(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.block = nn.Module()
    model.block.norm = layer
    return model


def test_layers_with_forward_hooks_are_refused() -> None:
    layer = nn.BatchNorm1d(3)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=r"'block\.norm' carries hooks"):
        convert_batchnorm(named(layer))


def test_tied_parameters_are_refused_and_both_names_given() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ModelError, match=r"'0\.weight' and '1\.weight'"):
        convert_batchnorm(model)


def test_the_source_model_is_not_changed_and_shares_nothing() -> None:
    model = seeded(ConvNet).train()
    before = copy.deepcopy(model.state_dict())
    converted = convert_batchnorm(model)
    converted(data(4, 1, 4, 4))
    with torch.no_grad():
        for tensor in [*converted.parameters(), *converted.buffers()]:
            tensor.fill_(7)
    assert type(model.bn1) is nn.BatchNorm2d
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_mode_settings_and_requires_grad_are_kept() -> None:
    layer = nn.BatchNorm2d(3, eps=1e-3, momentum=0.3).eval()
    layer.weight.requires_grad_(False)
    mixed = convert_batchnorm(nn.Sequential(layer))[0]
    assert (mixed.eps, mixed.momentum, mixed.training, mixed.weight.requires_grad) == (1e-3, 0.3, False, False)
    assert "eps=0.001" in repr(mixed)


def test_one_value_a_channel_is_an_error_that_names_the_layer_in_training_only() -> None:
    model = convert_batchnorm(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ModelError, match="'1' got one value a channel"):
        model.train()(torch.randn(1, 4))
    assert model.eval()(torch.randn(1, 4)).shape == (1, 3)


def test_a_single_image_is_enough_for_a_convolution() -> None:
    layer, x = plain(), data(1, 3, 2, 2)
    mixed = convert_batchnorm(layer).train()
    set_beta(mixed, 1.0)
    torch.testing.assert_close(mixed(x), layer.train()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 2, 2), (4, 3, 2, 2, 2)])
def test_a_wrong_shape_is_an_error_that_names_the_layer(shape: tuple[int, ...]) -> None:
    mixed = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    for mode in (True, False):
        with pytest.raises(ModelError, match=r"layer '0' takes \(N, 3, \.\.\.\)"):
            mixed.train(mode)(torch.zeros(shape))


def test_resnet18_has_20_batch_norms_41_layers_62_tensors_and_predicts_as_before() -> None:
    model = randomize(torchvision.models.resnet18(num_classes=5)).eval()
    converted = convert_batchnorm(model)
    assert len(batchnorm_names(converted)) == 20
    assert len(learnable_layer_names(converted)) == 41
    assert len(FunctionalModel.of(converted).parameter_names) == 62
    assert batchnorm_names(converted)[:2] == ("bn1", "layer1.0.bn1")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_a_model_without_batch_norm_has_an_empty_beta_and_everything_works() -> None:
    module = convert_batchnorm(nn.Linear(3, 2).double())
    model = FunctionalModel.of(module)
    parameters, buffers = model.tensors()
    beta, eta = torch.zeros(0, dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64)
    assert model.batchnorm_names == ()
    assert collect_statistics(module, [data(4, 3)]).bn_divergence.shape == (0,)
    tuned = finetune(model, InnerState(parameters, buffers), [(data(4, 3), torch.tensor([0, 1, 1, 0]))], beta, eta)
    assert not torch.equal(tuned.final.parameters["weight"], parameters["weight"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_first_and_second_derivatives_by_every_tensor(training: bool, momentum: float | None) -> None:
    layer = convert_batchnorm(plain(momentum=momentum)).train(training)
    layer.forward_mode = FUNCTIONAL
    fixed = {n: b for n, b in layer.named_buffers() if n not in ("beta", "running_mean", "running_var")}
    names = ("weight", "bias", "beta", "running_mean", "running_var")

    def function(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = {**fixed, **dict(zip(names, tensors, strict=True))}
        outputs = functional_call(layer, state, (x,))
        return (outputs, state["running_mean"], state["running_var"]) if training else (outputs,)

    start = [layer.weight, layer.bias, torch.tensor(0.4).double(), layer.running_mean, layer.running_var]
    inputs = [t.detach().clone().requires_grad_() for t in (data(3, 3, 1, 2), *start)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_vmap_over_stacked_clients_equals_a_loop(training: bool, momentum: float | None) -> None:
    model = FunctionalModel.of(convert_batchnorm(seeded(lambda: ConvNet(momentum))))
    parameters, buffers = model.tensors()
    stacked = {name: torch.stack([b, b + 1, b + 2]) for name, b in buffers.items()}
    beta, x = torch.rand(3, 2).double(), data(3, 4, 1, 4, 4)

    def run(buffers: dict[str, Tensor], beta: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(parameters, buffers, beta, x, training=training)

    outputs, after = torch.vmap(run)(stacked, beta, x)
    for i in range(3):
        single, buffers_after = run({n: b[i] for n, b in stacked.items()}, beta[i], x[i])
        torch.testing.assert_close(outputs[i], single, rtol=1e-12, atol=1e-12)
        for name, value in buffers_after.items():
            torch.testing.assert_close(after[name][i], value, rtol=1e-12, atol=1e-12)


def test_conversion_forward_and_vmap_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = FunctionalModel.of(convert_batchnorm(seeded(ConvNet)))
        parameters, buffers = model.tensors()
        beta, x = torch.zeros(2, 2).double(), data(2, 4, 1, 4, 4)
        outputs = torch.vmap(lambda b, v: model(parameters, buffers, b, v, training=True)[0])(beta, x)
    assert outputs.shape == (2, 4, 3)


def fused(layer: nn.Module) -> MixedBatchNorm:
    assert isinstance(layer, MixedBatchNorm)
    other = copy.deepcopy(layer).train()
    other.forward_mode = FUSED
    return other


@pytest.mark.parametrize(("kind", "shape"), [*KINDS, (nn.BatchNorm2d, (4, 3, 5, 6))])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_kernels_give_what_arithmetic_gives(
    kind: type[nn.Module], shape: tuple[int, ...], beta: float, momentum: float | None
) -> None:
    layer = convert_batchnorm(plain(kind, momentum=momentum)).train()
    set_beta(layer, beta)
    inputs, weights = data(*shape), data(*shape, seed=1)
    if shape == (4, 3, 5, 6):
        inputs = inputs.to(memory_format=torch.channels_last)
    results = []
    for module in (layer, fused(layer)):
        leaf = inputs.clone().requires_grad_()
        outputs = module(leaf)
        gradients = torch.autograd.grad((outputs * weights).sum(), [leaf, module.weight, module.bias])
        results.append([outputs, module.running_mean, module.running_var, *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(layer.running_mean, plain(kind).running_mean) is False  # they moved


def test_kernels_pass_gradcheck_and_refuse_a_second_derivative() -> None:
    layer = convert_batchnorm(plain()).train()
    set_beta(layer, 0.6)

    def run(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(fused(layer), {"weight": weight, "bias": bias}, inputs)

    leaves = [t.detach().clone().requires_grad_() for t in (data(4, 3, 2, 2), layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(run, leaves)
    (gradient,) = torch.autograd.grad(run(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_kernels_do_not_take_goes_through_arithmetic_where_fused_too() -> None:
    wide = data(4, 3, 2, 2)
    for layer, mode, x in ((plain(affine=False), True, wide), (plain(), False, wide), (plain(), True, wide.float())):
        mixed = convert_batchnorm(layer)
        set_beta(mixed, 0.4)
        other = fused(mixed)
        assert torch.equal(mixed.train(mode)(x), other.train(mode)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_take_statistics_of_half_precision_inputs_in_full(dtype: torch.dtype) -> None:
    layer = convert_batchnorm(plain().float()).train()
    set_beta(layer, 0.4)
    inputs = data(64, 3, 4, 4).to(dtype)
    results = []
    for module in (layer, fused(layer)):
        leaf = inputs.clone().requires_grad_()
        outputs = module(leaf)
        gradients = torch.autograd.grad(outputs.float().square().sum(), [leaf, module.weight])
        assert outputs.dtype == gradients[0].dtype == dtype
        assert module.running_var.dtype == gradients[1].dtype == torch.float32
        results.append([outputs, *gradients, module.running_mean, module.running_var])
    for expected, actual, tolerance in zip(*results, (0.02, 0.05, 0.02, 1e-5, 1e-3), strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
