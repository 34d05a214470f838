"""Running statistics measured through the beta in use: exact, in one pass, and what a served model needs."""

import pytest
import torch
from core_cases import Case, ConvNet, close, conv_case, image_batches, make_case, seeded, unchanged
from torch import Tensor, nn

from fedl2p.core.finetune import evaluation_loss, predict
from fedl2p.core.functional import InnerState, concatenate
from fedl2p.core.recalibration import recalibrated_running
from fedl2p.core.settings import BatchNormMode
from fedl2p.errors import ModelError


class Deep(nn.Module):
    """Ten convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(10):
            layers += [nn.Conv2d(1 if index == 0 else 4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layers(inputs).mean((2, 3)))


def deep_case() -> Case:
    return make_case(seeded(Deep), image_batches(240, 233, seed=1), image_batches(6, seed=2))


def inputs_of(case: Case) -> list[Tensor]:
    return [inputs for inputs, _ in case.train]


def recalibrated(case: Case, beta: Tensor, **options: int) -> InnerState:
    state = case.start
    return InnerState(
        state.parameters,
        {**state.buffers, **recalibrated_running(case.model, state, beta, inputs_of(case), **options)},
    )


def layer_inputs(case: Case, state: InnerState, beta: Tensor) -> list[Tensor]:
    """What every batch norm gets from the whole training set in evaluation mode."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        for layer in case.model.module.modules()
        if hasattr(layer, "pretrained_mean")
    ]
    predict(case.model, state, beta, torch.cat(inputs_of(case)))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_each_layer_of_a_deep_net_has_the_statistics_of_what_it_gets(beta: float) -> None:
    case = deep_case()
    betas = torch.full((10,), beta, dtype=torch.float64)
    state = recalibrated(case, betas)
    for name, inputs in zip(case.model.batchnorm_names, layer_inputs(case, state, betas), strict=True):
        # A variance in evaluation is n / (n - 1) times that in the pass, n = 473 * 16 here.
        torch.testing.assert_close(state.buffers[f"{name}.running_mean"], inputs.mean((0, 2, 3)), rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(state.buffers[f"{name}.running_var"], inputs.var((0, 2, 3)), rtol=5e-3, atol=0)


def test_at_beta_1_evaluation_is_that_with_batch_statistics_where_the_measured_start_is_far_off() -> None:
    case = deep_case()
    ones = torch.ones(10, dtype=torch.float64)
    whole = [concatenate(case.train)]
    batch = evaluation_loss(case.model, case.start, ones, whole, bn_mode=BatchNormMode.batch)
    measured = evaluation_loss(case.model, case.start, ones, whole)
    found = evaluation_loss(case.model, recalibrated(case, ones), ones, whole)
    assert float(found) == pytest.approx(float(batch), rel=1e-3)
    assert abs(float(measured - batch)) > 10 * abs(float(found - batch))


def test_at_beta_0_they_are_the_measured_ones() -> None:
    case = conv_case()
    found = recalibrated_running(case.model, case.start, torch.zeros(2, dtype=torch.float64), inputs_of(case))
    for name in case.model.batchnorm_names:
        close(found[f"{name}.running_mean"], case.statistics.channel_mean[name], 1e-12)
        close(found[f"{name}.running_var"], case.statistics.channel_var[name], 1e-12)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_they_do_not_depend_on_momentum_nor_on_where_running_statistics_were(momentum: float | None) -> None:
    expected = recalibrated(conv_case(), torch.tensor([0.4, 0.9], dtype=torch.float64)).buffers
    case = conv_case(momentum=momentum)
    case.start.buffers["bn1.running_mean"] = torch.full((2,), 1e6, dtype=torch.float64)
    with unchanged(case.start):
        found = recalibrated(case, torch.tensor([0.4, 0.9], dtype=torch.float64)).buffers
    for key in ("bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var"):
        close(found[key], expected[key], 1e-12)


def test_a_layer_of_momentum_0_keeps_its_own() -> None:
    case = conv_case(momentum=0.0)
    assert recalibrated_running(case.model, case.start, case.beta, inputs_of(case)) == {}


def test_more_samples_than_fit_at_once_are_merged() -> None:
    case = make_case(seeded(ConvNet), image_batches(300, 1, 299, seed=1), image_batches(3))
    at_once = recalibrated(case, case.beta).buffers
    for largest in (599, 200):
        for key, value in recalibrated(case, case.beta, largest=largest).buffers.items():
            torch.testing.assert_close(value, at_once[key], rtol=0.02, atol=0.02)


def test_gradients_and_vmap_pass() -> None:
    case = conv_case()

    def summed(beta: Tensor) -> Tensor:
        return recalibrated_running(case.model, case.start, beta, inputs_of(case))["bn2.running_var"].sum()

    step = torch.tensor([1e-6, 0.0], dtype=torch.float64)
    expected = (summed(case.beta + step) - summed(case.beta - step)) / 2e-6
    assert float(torch.func.grad(summed)(case.beta)[0]) == pytest.approx(float(expected), rel=1e-6)
    close(torch.vmap(summed)(torch.stack([case.beta, case.beta]))[1], summed(case.beta), 1e-12)


def test_one_value_a_channel_is_refused_with_the_layer() -> None:
    case = make_case(
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double(),
        [(torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))],
        [],
    )
    with pytest.raises(ModelError, match="'1' got one value a channel"):
        recalibrated_running(case.model, case.start, case.beta, [torch.randn(1, 3, dtype=torch.float64)])
