"""Tensors as Flower's arrays and back, and their weighted mean."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fedl2p.errors import FederationError
from fedl2p.federation.aggregation import WeightedMean
from fedl2p.federation.local import flower_run
from fedl2p.federation.messages import from_arrays, instruction, reply, to_arrays


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    with flower_run():
        yield


def every_kind() -> dict[str, Tensor]:
    return {
        "weights": torch.randn(2, 3),
        "double": torch.randn(4, dtype=torch.float64),
        "half": torch.randn(3, dtype=torch.float16),
        "count": torch.tensor(7),
        "scalar": torch.tensor(0.25),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 5),
        "transposed": torch.randn(4, 3).T,
    }


def test_types_shapes_order_and_values_survive_the_way_there_and_back() -> None:
    sent = every_kind()
    received = from_arrays(to_arrays(sent), sent)
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype
        assert received[name].shape == tensor.shape
        assert torch.equal(received[name], tensor)


def test_received_tensors_share_no_memory_with_the_record() -> None:
    sent = {"a": torch.ones(3)}
    arrays = to_arrays(sent)
    from_arrays(arrays, sent)["a"].fill_(5)
    assert torch.equal(from_arrays(arrays, sent)["a"], torch.ones(3))


def test_received_tensors_lie_in_memory_as_torch_s_own_do() -> None:
    # A matrix-vector product rounds otherwise where its weights are not aligned, so a run would not surely repeat.
    sent = {f"t{size}": torch.zeros(size) for size in range(1, 60)}
    received = from_arrays(to_arrays(sent), sent)
    assert {tensor.data_ptr() % 64 for tensor in received.values()} == {0}


def test_an_average_that_came_back_as_float64_gets_its_own_type() -> None:
    like = {"a": torch.zeros(2), "n": torch.tensor(0)}
    received = from_arrays(to_arrays({"a": torch.ones(2).double(), "n": torch.tensor(3.0).double()}), like)
    assert (received["a"].dtype, received["n"].dtype) == (torch.float32, torch.int64)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(FederationError, match="missing are \\['b'\\]"):
        from_arrays(to_arrays({"a": torch.zeros(2)}), {"a": torch.zeros(2), "b": torch.zeros(2)})


def test_a_tensor_too_many_is_refused() -> None:
    with pytest.raises(FederationError, match="other tensors than expected"):
        from_arrays(to_arrays({"a": torch.zeros(2), "b": torch.zeros(2)}), {"a": torch.zeros(2)})


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    with pytest.raises(FederationError, match=r"'a'.*\(3,\), expected \(2,\)"):
        from_arrays(to_arrays({"a": torch.zeros(3)}), {"a": torch.zeros(2)})


def test_instruction_and_reply_carry_tensors_and_numbers() -> None:
    message = instruction("train.meta", 7, arrays=to_arrays({"a": torch.ones(2)}), config={"server-round": 3})
    assert (message.metadata.message_type, message.metadata.dst_node_id) == ("train.meta", 7)
    assert message.content.config_records["config"]["server-round"] == 3
    answer = reply(message, metrics={"loss": 0.5})
    assert answer.content.metric_records["metrics"]["loss"] == 0.5
    assert not answer.content.array_records


def test_instructions_may_share_one_record() -> None:
    record = to_arrays({"a": torch.ones(2)})
    messages = [instruction("train.meta", node, arrays=record, config={}) for node in (1, 2)]
    assert all(message.content.array_records["arrays"] is record for message in messages)


def weighted_mean(parts: list[tuple[float, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    mean = WeightedMean()
    for weight, tensors in parts:
        mean.add(weight, tensors)
    return mean.result()


def test_the_mean_is_weighted_and_keeps_types() -> None:
    parts = [
        (1.0, {"a": torch.tensor([0.0, 4.0]), "n": torch.tensor(2)}),
        (3.0, {"a": torch.tensor([8.0, 0.0]), "n": torch.tensor(6)}),
    ]
    mean = weighted_mean(parts)
    assert torch.equal(mean["a"], torch.tensor([6.0, 1.0]))
    assert torch.equal(mean["n"], torch.tensor(5))
    assert mean["a"].dtype == torch.float32


def test_the_mean_of_equal_integers_is_that_integer() -> None:
    mean = weighted_mean([(1.0, {"n": torch.tensor(1)})] * 10)
    assert torch.equal(mean["n"], torch.tensor(1))
