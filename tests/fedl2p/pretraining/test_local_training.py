"""A client's part of FedAvg, without a federation."""

from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.errors import ConfigError
from fedl2p.pretraining.fedavg import LocalTraining
from fedl2p.seeding import derive_seed


class Line(FederatedDataModule):
    """One client of five samples, in two classes."""

    num_classes = 2

    def build_clients(self) -> Iterable[ClientData]:
        inputs = torch.tensor([[-2.0], [-1.0], [0.5], [1.0], [3.0]])
        data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
        yield ClientData(name="only", pool="seen", train=data, val=data, test=data)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(1, 2)


def test_a_client_trains_by_sgd_with_momentum_from_the_tensors_that_it_is_given() -> None:
    data, model = Line(batch_size=2), network()
    training = LocalTraining(data, network(), epochs=2, lr=0.1, momentum=0.9, seed=3)
    start = {name: t + 0.5 for name, t in model.state_dict().items()}
    trained, samples = training.train(start, 0, 4, lr_scale=0.1)
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = data.client(0, seed=derive_seed(3, "pretrain", 4, 0)).train_dataloader()
    for _ in range(2):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    assert samples == 5
    assert all(torch.equal(trained[name], t) for name, t in model.state_dict().items())


def test_the_given_model_is_not_changed() -> None:
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    LocalTraining(Line(batch_size=2), model, seed=3).train(before, 0, 1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("options", [{"epochs": 0}, {"lr": 0.0}, {"lr": -1.0}, {"momentum": 1.0}, {"momentum": -0.1}])
def test_impossible_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(options))} (is )?{next(iter(options.values()))}"):
        LocalTraining(Line(), network(), **options)  # type: ignore[arg-type]


class Half:
    """A CPU in half precision; Lightning's Fabric has float16 on GPUs only."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=self.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_nearly_the_same_model_in_float32(dtype: torch.dtype) -> None:
    start = dict(network().state_dict())
    full, _ = LocalTraining(Line(batch_size=2), network(), epochs=3).train(start, 0, 1)
    half, _ = LocalTraining(Line(batch_size=2), network(), epochs=3, fabric=Half(dtype)).train(start, 0, 1)  # type: ignore[arg-type]
    for name, tensor in full.items():
        assert half[name].dtype == torch.float32 and not torch.equal(half[name], tensor)
        moved = float((tensor - start[name]).abs().max())
        torch.testing.assert_close(half[name], tensor, rtol=0, atol=0.05 * moved)


def test_a_model_in_double_precision_is_trained_in_it() -> None:
    start = dict(network().double().state_dict())
    full, _ = LocalTraining(Line(batch_size=2), network()).train(dict(network().state_dict()), 0, 1)
    double, _ = LocalTraining(Line(batch_size=2), network().double()).train(start, 0, 1)
    for name, tensor in double.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor.float(), full[name], rtol=0, atol=1e-6)
