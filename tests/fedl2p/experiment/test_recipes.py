"""Recipes to compare with: the mean of many, and Auto-RGN."""

import math

import pytest
import torch
from core_cases import ConvNet, image_batches, seeded
from torch import Tensor, nn

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.episode import Episode, make_episode
from fedl2p.core.functional import FunctionalModel, InnerState
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.statistics import collect_statistics
from fedl2p.errors import ConfigError
from fedl2p.experiment.config import load_config
from fedl2p.experiment.methods import FINE_TUNING, TunedRate, best_fine_tuning, tuned_methods
from fedl2p.experiment.recipes import mean_recipe, rate_shares, relative_gradient_norms


def test_the_mean_recipe_is_the_mean_of_beta_and_of_eta() -> None:
    recipes = [
        Hyperparameters(torch.tensor([0.0, 1.0]), torch.tensor([0.1, -0.3, 0.0])),
        Hyperparameters(torch.tensor([0.5, 1.0]), torch.tensor([0.3, 0.1, 0.0])),
    ]
    beta, eta = mean_recipe(recipes)
    torch.testing.assert_close(beta, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(eta, torch.tensor([0.2, -0.1, 0.0]))


def linear_case(bias: list[float]) -> tuple[FunctionalModel, InnerState, Episode]:
    """W is the identity; mean squared error over two outputs, so dL/dW is the outer product of output and input."""
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
        linear.bias.copy_(torch.tensor(bias))
    model = FunctionalModel.of(convert_batchnorm(linear), loss_fn=nn.functional.mse_loss)
    zeros = torch.zeros(1, 2)
    batches = [(torch.tensor([[3.0, 4.0]]), zeros), (torch.tensor([[0.0, 1.0]]), zeros)]
    empty: tuple[Tensor, Tensor, Tensor] = (torch.zeros(0), torch.zeros(2), torch.tensor(2.0))
    return model, InnerState(*model.tensors()), Episode(empty, {}, batches, [])


def test_relative_gradient_norms_are_those_computed_by_hand() -> None:
    model, origin, episode = linear_case([0.0, 1.0])
    # Batch 1: output (3, 5), |dW| = |(3, 5)| |(3, 4)| = 5 sqrt(34), |db| = sqrt(34). Batch 2: (0, 2), |dW| = |db| = 2.
    one = relative_gradient_norms(model, origin, episode, 1, beta=1.0)
    torch.testing.assert_close(one, torch.tensor([5 * math.sqrt(34) / math.sqrt(2), math.sqrt(34)]))
    both = relative_gradient_norms(model, origin, episode, 2, beta=1.0)
    expected = torch.tensor([(5 * math.sqrt(34) + 2) / 2 / math.sqrt(2), (math.sqrt(34) + 2) / 2])
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(rate_shares(both), torch.tensor([1.0, float(expected[1] / expected[0])]))


def test_a_tensor_of_zeros_gets_the_whole_rate_and_counts_for_nothing_else() -> None:
    model, origin, episode = linear_case([0.0, 0.0])
    norms = relative_gradient_norms(model, origin, episode, 1, beta=1.0)
    torch.testing.assert_close(norms, torch.tensor([25 / math.sqrt(2), math.inf]))
    assert rate_shares(norms).tolist() == [1.0, 1.0]
    assert rate_shares(torch.tensor([1.0, math.nan, 4.0, 0.0])).tolist() == [0.25, 1.0, 1.0, 0.0]
    assert rate_shares(torch.tensor([math.inf, 0.0])).tolist() == [1.0, 1.0]


def test_without_training_batches_all_tensors_count_alike() -> None:
    model, origin, episode = linear_case([0.0, 1.0])
    assert relative_gradient_norms(model, origin, episode, 0, beta=1.0).tolist() == [1.0, 1.0]


def test_relative_gradients_are_taken_in_training_mode_through_the_beta_in_use() -> None:
    model = FunctionalModel.of(convert_batchnorm(seeded(ConvNet)))
    batches = image_batches(8, seed=1)
    origin, statistics = InnerState(*model.tensors()), collect_statistics(model.module, batches)
    episode = make_episode(model, statistics, list(batches))
    parameters = {name: p.clone().requires_grad_() for name, p in origin.parameters.items()}
    buffers = episode.start(origin).buffers
    loss, _ = model.loss(parameters, buffers, torch.ones(2).double(), episode.train_batches[0], training=True)
    loss.backward()
    gradients = {name: p.grad for name, p in parameters.items()}
    expected = torch.stack([gradients[n].norm() / parameters[n].detach().norm() for n in model.parameter_names])
    found = relative_gradient_norms(model, origin, episode, 1, beta=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    other = relative_gradient_norms(model, origin, episode, 1, beta=0.0)
    assert not torch.allclose(found, other)


def test_auto_rgn_is_tuned_beside_the_three_unless_it_is_off(mine: str) -> None:
    config = load_config([mine, "output_dir=x", "client.evaluation_statistics=batch"])
    assert list(tuned_methods(config)) == [*FINE_TUNING, "auto_rgn"]
    assert tuned_methods(config)["auto_rgn"].bn_mode == "batch"
    assert tuned_methods(load_config([mine, "output_dir=x", "baselines.auto_rgn=false"])) == FINE_TUNING


def test_the_best_fine_tuning_has_the_lowest_validation_loss_if_any_was_measured() -> None:
    assert best_fine_tuning({"a": TunedRate(0.1, 0.7), "b": TunedRate(0.1, 0.5), "c": TunedRate(0.1)}) == "b"
    assert best_fine_tuning({"a": TunedRate(0.1)}) is None


@pytest.mark.parametrize("key", ["steps=-1", "step_size=0", "farthest=0"])
def test_impossible_refinement_settings_are_refused_with_their_section(key: str, mine: str) -> None:
    name = key.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^refinement\.{name} is "):
        load_config([mine, "output_dir=x", f"refinement.{key}"])
