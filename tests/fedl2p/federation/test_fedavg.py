"""FedAvg of the global model, against an average written by hand."""

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.errors import FederationError
from fedl2p.federation.fedavg import make_pretrain_app, pretrain
from fedl2p.federation.local import LocalGrid, flower_run
from fedl2p.pretraining.fedavg import LocalTraining
from fedl2p.seeding import derive_seed


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    with flower_run():
        yield


class Blobs(FederatedDataModule):
    """Clients of unequal size in the pool `pretrain`, classes that a line can tell apart, and one seen client."""

    num_classes = 2

    def __init__(self, sizes: tuple[int, ...] = (8, 12, 5), bad: int | None = None) -> None:
        super().__init__(batch_size=4)
        self.sizes, self.bad = sizes, bad

    def build_clients(self) -> Iterable[ClientData]:
        for number, size in enumerate((*self.sizes, 4)):
            generator = torch.Generator().manual_seed(number)
            targets = torch.randint(2, (size,), generator=generator)
            inputs = torch.randn(size, 3, generator=generator) + 2 * targets[:, None]
            if number == self.bad:
                inputs = inputs[:, :2]
            data = TensorDataset(inputs, targets)
            pool = "pretrain" if number < len(self.sizes) else "seen"
            yield ClientData(name=f"c{number}", pool=pool, train=data, val=data, test=data)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def train(data: Blobs, model: nn.Module, rounds: int, **options: Any) -> nn.Module:
    training = LocalTraining(data, model, **({"lr": 0.1, "seed": 3} | options))
    return pretrain(
        LocalGrid(make_pretrain_app(training), data.pool("pretrain")),
        model,
        client_ids=data.pool("pretrain"),
        rounds=rounds,
        min_reply_fraction=1.0,
    )


def loss(model: nn.Module, data: Blobs) -> float:
    model.eval()
    with torch.no_grad():
        parts = [data.clients[i].train.tensors for i in data.pool("pretrain")]  # type: ignore[attr-defined]
        return sum(float(nn.functional.cross_entropy(model(x), y, reduction="sum")) for x, y in parts)


def local(data: Blobs, model: nn.Module, client_id: int, number: int, epochs: int) -> dict[str, Tensor]:
    """A client's SGD with momentum, as torch does it."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = data.client(client_id, seed=derive_seed(3, "pretrain", number, client_id)).train_dataloader()
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return dict(model.state_dict())


def test_the_model_is_the_average_by_samples_of_what_clients_trained() -> None:
    data, expected = Blobs(), network()
    for number in (1, 2):
        states = [local(data, expected, i, number, epochs=2) for i in range(3)]
        mean = {
            name: sum(size * state[name].double() for size, state in zip(data.sizes, states, strict=True)) / 25
            for name in states[0]
        }
        expected.load_state_dict({name: torch.as_tensor(t) for name, t in mean.items()})
    trained = train(data, network(), 2, epochs=2)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(trained.state_dict()[name], parameter.detach(), rtol=0, atol=1e-6)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(trained.state_dict()[name], expected.state_dict()[name], rtol=0, atol=1e-6)


def test_types_are_kept_and_the_given_model_is_not_changed() -> None:
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trained = train(Blobs(), model, 1)
    assert {n: t.dtype for n, t in trained.state_dict().items()} == {n: t.dtype for n, t in before.items()}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not trained.training


@pytest.mark.parametrize(
    "clients",
    [
        1,
        pytest.param(
            10,
        ),
    ],
)
def test_a_count_that_all_clients_agree_on_is_the_average_s(clients: int) -> None:
    trained = train(Blobs(sizes=(4,) * clients), network(), 1)
    assert trained.state_dict()["1.num_batches_tracked"].item() == 1


def test_training_lowers_the_loss_and_each_round_is_reported() -> None:
    data, rounds = Blobs(), []
    training = LocalTraining(data, network(), lr=0.1, seed=3)
    grid = LocalGrid(make_pretrain_app(training), data.pool("pretrain"))
    trained = pretrain(grid, network(), client_ids=range(3), rounds=6, on_round=rounds.append)
    assert rounds == [1, 2, 3, 4, 5, 6]
    assert loss(trained, data) < 0.9 * loss(network(), data)


def test_training_repeats_bit_for_bit() -> None:
    states = []
    for process_seed in (11, 12):
        torch.manual_seed(process_seed)
        states.append(train(Blobs(), network(), 2).state_dict())
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    other = train(Blobs(), network(), 2, seed=4).state_dict()
    assert not torch.equal(other["0.weight"], states[0]["0.weight"])


def test_a_client_that_fails_stops_the_pretraining_with_the_reason() -> None:
    with pytest.raises(FederationError, match=r"Pretraining, round 1: a client failed: .*shapes"):
        train(Blobs(bad=1), network(), 1)


@pytest.mark.parametrize("rate", [1e30, math.inf])
def test_a_model_that_is_not_finite_stops_the_pretraining(rate: float) -> None:
    with pytest.raises(FederationError, match=r"is not finite; choose a lower pretraining\.lr"):
        train(Blobs(), network(), 5, lr=rate)


# Which clients, at which rate


class Recorded(LocalTraining):
    """Notes who was asked, in which round, at which rate."""

    def train(self, tensors: Any, client_id: int, round_number: int, *, lr_scale: float = 1.0) -> Any:
        self.calls.append((round_number, client_id, lr_scale))
        return super().train(tensors, client_id, round_number, lr_scale=lr_scale)


def recorded(rounds: int, **options: Any) -> list[tuple[int, int, float]]:
    data, model = Blobs(sizes=(4,) * 10), network()
    training = Recorded(data, model, lr=0.1, seed=3)
    training.calls = []  # type: ignore[attr-defined]
    pool = data.pool("pretrain")
    pretrain(LocalGrid(make_pretrain_app(training), pool), model, client_ids=pool, rounds=rounds, **options)
    return training.calls  # type: ignore[attr-defined,no-any-return]


def test_the_rate_falls_to_a_tenth_at_each_drop() -> None:
    rates = {number: rate for number, _, rate in recorded(5, lr_drops=[3, 5])}
    assert rates == pytest.approx({1: 1.0, 2: 1.0, 3: 0.1, 4: 0.1, 5: 0.01})


def test_a_fraction_of_the_clients_is_drawn_anew_each_round_by_the_seed() -> None:
    def drawn(seed: int) -> list[list[int]]:
        calls = recorded(6, client_fraction=0.3, seed=seed)
        return [[client for number, client, _ in calls if number == n] for n in range(1, 7)]

    first = drawn(0)
    assert all(len(clients) == len(set(clients)) == 3 for clients in first)
    assert len({tuple(clients) for clients in first}) > 1
    assert first == drawn(0) and first != drawn(1)


def test_at_least_one_client_takes_part() -> None:
    assert [call[0] for call in recorded(2, client_fraction=0.01)] == [1, 2]
