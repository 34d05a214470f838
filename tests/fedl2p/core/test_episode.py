"""An episode: what it is made from, where fine-tuning starts, and how loaders become batches."""

from collections.abc import Iterator

import pytest
import torch
from core_cases import conv_case
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fedl2p.core.episode import gather_batches, make_episode
from fedl2p.core.finetune import initial_running
from fedl2p.core.functional import InnerState
from fedl2p.core.settings import RunningStart


@pytest.mark.parametrize("start", RunningStart)
def test_an_episode_has_the_nets_inputs_the_running_statistics_and_all_batches(start: RunningStart) -> None:
    case = conv_case(momentum=None)
    episode = make_episode(case.model, case.statistics, case.train, case.val, case.train[:1], running_start=start)
    for found, expected in zip(episode.net_inputs, case.statistics.net_inputs(), strict=True):
        assert torch.equal(found, expected)
    running = initial_running(case.model, case.model.tensors()[1], case.statistics, start=start)
    assert episode.running.keys() == running.keys()
    assert all(torch.equal(tensor, running[name]) for name, tensor in episode.running.items())
    assert (episode.train_batches, episode.val_batches, episode.test_batches) == (case.train, case.val, case.train[:1])
    assert episode.loss_batch is case.train[0]
    assert episode.cohort_size is None


def test_fine_tuning_starts_from_theta_g_with_the_clients_running_statistics() -> None:
    case = conv_case()
    origin = InnerState(*case.model.tensors())
    start = make_episode(case.model, case.statistics, case.train).start(origin)
    assert start.parameters is origin.parameters
    assert list(start.buffers) == list(origin.buffers)
    for name, buffer in start.buffers.items():
        assert torch.equal(buffer, case.start.buffers[name])
    assert not torch.equal(start.buffers["bn1.running_mean"], origin.buffers["bn1.running_mean"])


def test_without_training_data_there_is_no_loss_batch() -> None:
    case = conv_case(steps=0)
    episode = make_episode(case.model, case.statistics, [], case.val)
    assert not episode.loss_batch
    assert (episode.train_batches, episode.test_batches) == ([], [])


def loader_of(count: int, **options: bool) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.arange(count), torch.arange(count) % 3), batch_size=2, **options)


def test_passes_are_cut_as_lightning_does() -> None:
    loader = loader_of(10)
    limits = (None, 1.0, 3, 99, 0.5, 0, 0.0, 1)
    assert [len(gather_batches(loader, limit=limit)) for limit in limits] == [5, 5, 3, 5, 2, 0, 0, 1]
    assert len(gather_batches(loader, epochs=3, limit=2)) == 6
    assert gather_batches(loader, epochs=0) == []


def test_each_epoch_is_a_pass_of_its_own_over_pairs() -> None:
    torch.manual_seed(0)
    batches = gather_batches(loader_of(64, shuffle=True), epochs=2)
    assert all(type(batch) is tuple and len(batch) == 2 for batch in batches)
    first, second = (torch.cat([x for x, _ in batches[i : i + 32]]) for i in (0, 32))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


def test_no_more_is_read_than_the_limit_asks_for() -> None:
    read: list[int] = []

    class Stream:
        def __iter__(self) -> Iterator[list[Tensor]]:
            for number in range(5):
                read.append(number)
                yield [torch.zeros(2), torch.zeros(2)]

    assert len(gather_batches(Stream(), limit=2)) == 2
    assert read == [0, 1]
    assert len(gather_batches(Stream())) == 5
