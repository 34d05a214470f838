"""Clients in cohorts: which go together, how they are stacked, and how many."""

from collections.abc import Callable

import pytest
import torch
from core_cases import ConvNet, conv_case, image_batches
from torch import nn

from fedl2p.core import cohort
from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.cohort import activations, automatic_cohort_size, groups, stack, take
from fedl2p.core.episode import Episode, make_episode
from fedl2p.core.functional import FunctionalModel
from fedl2p.core.statistics import collect_statistics


def episode_of(train: tuple[int, ...], val: tuple[int, ...], test: tuple[int, ...]) -> Episode:
    case = conv_case()
    return make_episode(case.model, case.statistics, *(image_batches(*sizes) for sizes in (train, val, test)))


def test_groups_are_of_equal_shapes_bounded_and_complete() -> None:
    odd, even = episode_of((5, 4), (3, 2), (4,)), episode_of((6,), (4,), (3, 1))
    episodes = [odd, even, odd, even, odd]
    assert list(groups(episodes, 16)) == [[0, 2, 4], [1, 3]]
    assert list(groups(episodes, 2)) == [[0, 2], [4], [1, 3]]
    assert list(groups(episodes)) == [[0, 2, 4], [1, 3]]
    assert list(groups([], 2)) == []


def test_clients_without_training_data_go_together_and_not_with_others() -> None:
    without, with_data = episode_of((), (3,), ()), episode_of((4,), (3,), ())
    assert list(groups([without, with_data, without])) == [[0, 2], [1]]
    assert stack([without, without]).cohort_size == 2


def test_batches_of_other_structures_do_not_go_together() -> None:
    pair, single = torch.zeros(2, 3), torch.zeros(2)
    inputs = [{"a": pair}, {"b": pair}, (pair,), [pair], {"a": single}, {"a": pair}]
    assert list(groups(inputs)) == [[0, 5], [1], [2], [3], [4]]


def test_stack_and_take_are_inverse() -> None:
    trees = [{"a": torch.rand(2), "b": [(torch.rand(3), torch.rand(()))]} for _ in range(3)]
    stacked = stack(trees)
    assert stacked["b"][0][0].shape == (3, 3)
    assert torch.equal(take(stacked, 1)["b"][0][1], trees[1]["b"][0][1])


@pytest.mark.parametrize("net", [ConvNet, lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3))])
def test_an_episode_knows_how_many_clients_are_stacked_in_it(net: Callable[[], nn.Module]) -> None:
    """Without batch norms there is no xi to count, only its shape."""
    model = FunctionalModel.of(convert_batchnorm(net().double()))
    train = image_batches(4)
    episode = make_episode(model, collect_statistics(model.module, train), train, image_batches(3))
    assert episode.cohort_size is None
    for count in (1, 2, 5):
        assert stack([episode] * count).cohort_size == count
    assert take(stack([episode] * 2), 0).cohort_size is None


# How many clients go together


def test_activations_are_the_outputs_of_all_layers_of_a_pass() -> None:
    """conv1 2x16, bn1 2x16, conv2 3x9, bn2 3x9, dropout 3, fc 3: 124 values an image of 4x4."""
    model = FunctionalModel.of(convert_batchnorm(ConvNet().float()))
    assert activations(model, torch.zeros(5, 1, 4, 4)) == 5 * 124


def test_activations_of_inputs_that_are_a_dict_or_a_tuple_are_counted() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 5)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.left(left), self.right(right)], 1)

    model = FunctionalModel.of(Two())
    left, right = torch.zeros(6, 3), torch.zeros(6, 4)
    for inputs in ((left, right), {"left": left, "right": right}, {"right": right, "left": left}):
        assert activations(model, inputs) == 6 * 7
        assert automatic_cohort_size(model, inputs, history=1) == 64


@pytest.mark.parametrize(
    ("budget", "expected"), [(1, 1), (5 * 124 * 7 + 3, 7), (10**9, 64)], ids=["too large", "some", "many"]
)
def test_the_automatic_size_keeps_a_pass_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, budget: int, expected: int
) -> None:
    monkeypatch.setattr(cohort, "CPU_COHORT_VALUES", budget)
    model = FunctionalModel.of(convert_batchnorm(ConvNet().float()))
    assert automatic_cohort_size(model, torch.zeros(5, 1, 4, 4), history=15) == expected
