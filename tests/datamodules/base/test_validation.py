"""What samples must be like: one sentence that names the client, for sets in memory and for those that are read."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedl2p.datamodules import ClientData, FederatedDataModule
from fedl2p.datamodules.base import validation
from fedl2p.datamodules.base.arrays import ArrayDataset, Arrays
from fedl2p.errors import DataError

SIZE = 12


class OneByOne(Dataset[Any]):
    """A set that is read sample by sample, and counts what was asked for."""

    def __init__(self, inputs: Any, labels: Any) -> None:
        self.inputs, self.labels = inputs, labels
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.asked.append(index)
        return self.inputs[index], self.labels[index]


def in_arrays(inputs: Tensor, labels: Tensor) -> ArrayDataset:
    return ArrayDataset(Arrays(inputs, labels))


class Two(FederatedDataModule):
    """Client `good`, and `bad`, one of whose sets is another one."""

    num_classes = 3

    def __init__(self, **replaced: Dataset[Any]) -> None:
        super().__init__()
        self.replaced = replaced

    def build_clients(self) -> Iterable[ClientData]:
        fine: dict[str, Dataset[Any]] = {role: TensorDataset(*samples()) for role in ("train", "val", "test")}
        yield ClientData(name="good", pool="seen", **fine)
        yield ClientData(name="bad", pool="unseen", **(fine | self.replaced))


def samples() -> tuple[Tensor, Tensor]:
    return torch.rand(SIZE, 1, 4, 4), torch.arange(SIZE) % 3


def with_value(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = samples()[0].to(dtype)
    inputs[7, 0, 2, 2] = value
    return inputs


@pytest.mark.parametrize("role", ["train", "val", "test"])
@pytest.mark.parametrize("make", [TensorDataset, OneByOne, in_arrays])
@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (with_value(np.nan), None, "NaN, infinite or too large for float32"),
        (with_value(-np.inf), None, "NaN, infinite or too large"),
        (with_value(1e300, torch.float64), None, "too large for float32"),
        (torch.rand(SIZE, 3, 4, 4), None, r"shape \(3, 4, 4\); the first input of client 'good' has \(1, 4, 4\)"),
        (None, torch.arange(SIZE), r"has the label (3|11); labels are 0 to 2"),
        (None, torch.arange(SIZE) - 1, "has the label -1"),
    ],
)
def test_broken_samples_name_the_client_and_the_set(
    role: str, make: Callable[..., Dataset[Any]], inputs: Tensor | None, labels: Tensor | None, message: str
) -> None:
    fine = samples()
    dataset = make(fine[0] if inputs is None else inputs, fine[1] if labels is None else labels)
    data = Two(**{role: dataset})
    data.setup()
    with pytest.raises(DataError, match=f"Client 'bad': .*{role} set .*{message}"):
        data.check()


@pytest.mark.parametrize("make", [TensorDataset, OneByOne])
@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.zeros(SIZE, 1, 4, 4, dtype=torch.uint8), None, "inputs of type torch.uint8; they must be floating"),
        (torch.zeros(SIZE, 1, 4, 4, dtype=torch.complex64), None, "inputs of type torch.complex64"),
        (None, torch.arange(SIZE) / 4, "labels of type torch.float32, .* must be one whole number"),
        (None, torch.zeros(SIZE, dtype=torch.bool), "labels of type torch.bool"),
        (None, torch.zeros(SIZE, 1, dtype=torch.int64), r"each of shape \(1,\)"),
        (None, torch.zeros(SIZE, dtype=torch.int32), r"torch.int32.* \(int64\) from 0 to 2"),
    ],
)
def test_wrong_types_are_named(
    make: Callable[..., Dataset[Any]], inputs: Tensor | None, labels: Tensor | None, message: str
) -> None:
    fine = samples()
    with pytest.raises(DataError, match=f"Client 'bad': .*test set has .*{message}"):
        Two(test=make(fine[0] if inputs is None else inputs, fine[1] if labels is None else labels)).check()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (OneByOne(samples()[0], [0, 1, 2.5]), "sample 2 of its val set has labels of type torch.float32"),
        (OneByOne(samples()[0], ["cat"] * SIZE), "labels of type"),
        (OneByOne([1] * SIZE, [0] * SIZE), "has an input of type int; it must be a tensor"),
        (OneByOne(samples()[0][:3], [0] * SIZE), "sample 11 of its val set cannot be read: IndexError: "),
        (TensorDataset(*samples(), torch.zeros(SIZE)), "its val set has 3 tensors; it must have two"),
        ([torch.zeros(1)] * SIZE, "sample 0 of its val set is a Tensor; it must be a pair"),
    ],
)
def test_sets_that_are_no_sets_of_pairs(dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"Client 'bad': .*{message}"):
        Two(val=dataset).check()


def test_inputs_of_several_tensors_must_be_finite_too() -> None:
    def words(value: float) -> list[dict[str, Tensor]]:
        return [{"tokens": torch.arange(4), "weights": torch.full((4,), value)}] * SIZE

    with pytest.raises(DataError, match=r"Client 'bad': sample 0 of its train set .* NaN"):
        Two(train=OneByOne(words(np.nan), [0] * SIZE)).check()
    Two(train=OneByOne(words(1.0), [0] * SIZE)).check()


def test_good_data_of_every_kind_pass_and_random_states_stay() -> None:
    inputs, labels = samples()
    state = torch.get_rng_state()
    bytes_ = in_arrays((255 * inputs).to(torch.uint8), labels)
    for dataset in (OneByOne(inputs.numpy(), labels.tolist()), in_arrays(inputs.double(), labels), bytes_):
        Two(val=dataset).check()
    assert torch.equal(torch.get_rng_state(), state)


def test_sets_that_are_read_slowly_are_looked_at_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, ends = OneByOne(*samples()), OneByOne(*samples())
    Two(test=whole).check()
    assert sorted(whole.asked) == list(range(SIZE))
    monkeypatch.setattr(validation, "MAX_SECONDS", 0.0)
    Two(test=ends).check()
    assert {0, SIZE - 1} <= set(ends.asked) and len(ends.asked) <= 3
