"""Models and data off the beaten track: refused by name or treated right, never silently wrong."""

import copy

import pytest
import torch
from core_cases import close, conv_case, image_batches, make_case, seeded, unchanged
from torch import Tensor, nn
from torch.func import functional_call

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.episode import Episode, make_episode
from fedl2p.core.functional import InnerState
from fedl2p.core.hypergradients import FOMAML
from fedl2p.core.learner import Learner
from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.meta_step import meta_step
from fedl2p.core.settings import LearnerSettings, MetaLearningRates
from fedl2p.core.statistics import collect_statistics
from fedl2p.errors import ModelError

RATES = MetaLearningRates(bn_net=0.1, lr_net=0.1, base_lr=0.1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("training", [True, False])
def test_integers_in_a_batch_norm_are_refused_or_promoted_never_truncated(dtype: torch.dtype, training: bool) -> None:
    layer = convert_batchnorm(nn.BatchNorm1d(2)).train(training)
    inputs = torch.tensor([[0, 1], [3, 1], [1, 0]]).to(dtype)
    try:
        outputs = layer(inputs)
    except (ModelError, TypeError):
        return
    torch.testing.assert_close(outputs, layer(inputs.float()))


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.unused = nn.BatchNorm1d(5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.bn(inputs)


def test_a_batch_norm_that_is_never_reached_does_not_diverge() -> None:
    statistics = collect_statistics(convert_batchnorm(Unreached()), [torch.randn(6, 3)])
    assert statistics.bn_divergence[1] == 0


def test_a_batch_norm_that_is_never_reached_has_channels_of_its_shape() -> None:
    statistics = collect_statistics(convert_batchnorm(Unreached()), [torch.randn(6, 3)])
    assert statistics.channel_mean["unused"].shape == (5,)


def test_an_empty_batch_adds_nothing() -> None:
    model = convert_batchnorm(nn.BatchNorm1d(3).double())
    data = torch.randn(6, 3, dtype=torch.float64)
    close(collect_statistics(model, [data[:4], data[:0], data[4:]]).channel_var[""], data.var(0), 1e-12)


def test_layers_that_are_called_by_keyword_are_measured() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(input=inputs)

    assert collect_statistics(convert_batchnorm(Keyword()), [torch.randn(6, 3)]).layer_moments[1] > 0


def test_a_lambda_that_is_the_nets_own_parameters_can_be_updated() -> None:
    case = conv_case()
    nets = MetaNets(case.model.module).double()
    episode = make_episode(case.model, case.statistics, case.train, case.val)
    lambdas = [dict(nets.named_parameters())] * 2
    learner = Learner(case.model, nets, estimator=FOMAML(), settings=LearnerSettings(meta_lr=RATES))
    updates = learner.meta_update(lambdas, [[episode, episode]])
    assert updates[0].skipped == 0


def test_a_meta_step_without_training_batches_gives_the_direct_part() -> None:
    case = conv_case(steps=0)
    nets = MetaNets(case.model.module).double()
    client = Episode(case.statistics.net_inputs(), {}, [], case.val)
    lambda_ = {name: p.detach() for name, p in nets.named_parameters()}
    done = meta_step(case.model, nets, FOMAML(), InnerState(*case.model.tensors()), lambda_, client)
    assert done.finite


def test_buffers_that_another_layer_writes_to_in_place_are_not_the_callers() -> None:
    class Tracked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.norm = nn.InstanceNorm2d(2, track_running_stats=True)
            self.fc = nn.Linear(2, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.fc(torch.tanh(self.norm(self.conv(inputs))).mean((2, 3)))

    case = make_case(seeded(Tracked), image_batches(4, 4), image_batches(3))
    with unchanged(case.start):
        case.tune()


def test_a_converted_model_can_be_copied_after_an_ordinary_training_pass() -> None:
    model = convert_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).train()
    model(torch.randn(4, 3))
    assert torch.equal(copy.deepcopy(model)[1].running_mean, model[1].running_mean)


def test_every_kind_of_hook_on_a_batch_norm_is_refused() -> None:
    layer = nn.BatchNorm1d(3)
    layer.register_full_backward_pre_hook(lambda *_: None)
    with pytest.raises(ModelError, match="hooks"):
        convert_batchnorm(layer)


def test_a_batch_norm_that_a_plain_list_also_holds_is_converted_there_or_refused() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            self.order = [self.bn]

        def forward(self, inputs: Tensor) -> Tensor:
            return self.order[0](inputs)

    try:
        model = convert_batchnorm(Listed()).eval()
    except ModelError:
        return
    inputs = torch.randn(4, 3)
    moved = functional_call(model, {"bn.beta": torch.tensor(1.0), "bn.running_mean": torch.ones(3)}, (inputs,))
    torch.testing.assert_close(moved, (inputs - 1) / (1 + 1e-5) ** 0.5)
