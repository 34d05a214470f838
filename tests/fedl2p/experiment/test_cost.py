"""Bytes and operations, by hand."""

import pytest
import torch
from torch import nn

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.meta_nets import MetaNets
from fedl2p.experiment.cost import byte_count, compute_cost, forward_flops, peak_memory, traffic
from fedl2p.federation.state import RoundRecord


@pytest.fixture
def model() -> nn.Module:
    """A convolution to 4 channels of 6x6, a batch norm, and a layer to 5 classes."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return convert_batchnorm(network)


def test_operations_of_one_image(model: nn.Module) -> None:
    """The convolution has 4 * 36 * 9 multiply-adds, the linear layer 144 * 5; a multiply-add is two operations."""
    cost = compute_cost(model, MetaNets(model), (1, 8, 8), epochs=15)
    forward = 2 * (4 * 36 * 9 + 144 * 5)
    assert cost["forward"] == cost["statistics"] == forward
    assert cost["finetune"] == 45 * forward
    assert cost["paper_statistics"] / cost["finetune"] == pytest.approx(0.044, abs=0.001)  # Appendix C: 4.4 %
    bn_net, lr_net = 1 * 100 + 100 * 100 + 100 * 1, 6 * 100 + 100 * 100 + 100 * 6
    assert cost["meta_nets"] == 2 * (bn_net + lr_net)


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward_flops(model.eval(), torch.ones(1, 1, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_travels(model: nn.Module) -> None:
    """Lambda has 10 float32 values, the nets' inputs 4; three clients are asked in two rounds, one of them fails."""
    history = [
        RoundRecord(round=0, val_loss=1.0),
        RoundRecord(round=1, val_loss=1.0, clients=("a", "b")),
        RoundRecord(round=2, val_loss=1.0, clients=(), failures={"a": "no reply", "b (validation)": "no reply"}),
    ]
    sent = traffic(
        history,
        lambda_={"w": torch.zeros(10)},
        net_inputs={"shift": torch.zeros(4)},
        model=model,
        statistics=7,
        seen=5,
        validation=2,
        pretraining=3,
    )
    whole = byte_count(model.state_dict().values())
    assert sent["lambda"] == 40 and sent["global_model"] == whole
    assert sent["pretraining"] == {"down": 3 * whole, "up": 3 * whole}
    assert sent["once"] == {"down": 5 * whole, "up": 5 * 7 * 4}
    assert sent["rounds"] == {"down": 3 * 56, "up": 2 * 40}
    assert sent["validation"] == {"down": 3 * 2 * 56, "up": 3 * 2 * 8}


def test_memory_is_that_of_a_process() -> None:
    assert 50e6 < peak_memory()["process"] < 1e12
