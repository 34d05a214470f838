"""One client's loaders, and a federation of clients that a user writes."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fedl2p.datamodules import POOLS, ClientData, ClientDataModule, FederatedDataModule
from fedl2p.errors import DataError


class Numbers(Dataset[Any]):
    """A map-style data set that is no TensorDataset: item i is (i as a tensor of shape (1,), i % 2)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), index % 2


class Doubled(TensorDataset):
    """A TensorDataset that transforms one sample at a time."""

    def __getitem__(self, index: int) -> Any:
        assert isinstance(index, int)
        return tuple(2 * tensor for tensor in super().__getitem__(index))


class Endless(IterableDataset[Any]):
    """No length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def numbers(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(size)).unsqueeze(1), torch.arange(size) % 2)


def client(size: int = 20, *, train: Dataset[Any] | None = None, **other: Any) -> ClientData:
    fields = {"name": "a", "pool": "seen", "val": numbers(5), "test": numbers(6)} | other
    return ClientData(train=numbers(size) if train is None else train, **fields)


class Federation(FederatedDataModule):
    """What a user writes."""

    num_classes = 2

    def __init__(self, *clients: ClientData, batch_size: int = 4) -> None:
        super().__init__(batch_size=batch_size)
        self.given = clients
        self.builds = 0

    def build_clients(self) -> Iterable[ClientData]:
        self.builds += 1
        yield from self.given


def order(loader: DataLoader[Any]) -> list[int]:
    return [int(x) for batch, _ in loader for x in batch]


def batch_sizes(loader: DataLoader[Any]) -> list[int]:
    return [len(batch) for batch, _ in loader]


def loader(size: int = 20, batch_size: int = 4, seed: int = 0) -> DataLoader[Any]:
    return ClientDataModule(client(size), batch_size=batch_size, seed=seed).train_dataloader()


def test_training_order_depends_on_the_seed_alone() -> None:
    first = loader(seed=3)
    torch.manual_seed(99)
    second = loader(seed=3)
    state = torch.get_rng_state()
    for _ in range(3):
        assert order(first) == order(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert order(loader(seed=3)) != order(loader(seed=4))


def test_each_iteration_shuffles_anew_and_has_every_sample_once() -> None:
    one = loader()
    orders = [order(one) for _ in range(4)]
    assert all(sorted(each) == list(range(20)) for each in orders)
    assert len({tuple(each) for each in orders}) == 4


def test_a_new_loader_starts_again() -> None:
    module = ClientDataModule(client(), batch_size=4, seed=5)
    assert order(module.train_dataloader()) == order(module.train_dataloader())


@pytest.mark.parametrize(
    ("size", "batch_size", "expected"),
    [
        (9, 4, [4, 5]),
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (5, 4, [5]),
        (1, 4, [1]),
        (3, 4, [3]),
        (3, 2, [3]),
        (3, 1, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("kind", [numbers, Numbers])
def test_a_last_batch_of_one_is_merged(kind: Any, size: int, batch_size: int, expected: list[int]) -> None:
    made = ClientDataModule(client(train=kind(size)), batch_size=batch_size).train_dataloader()
    assert batch_sizes(made) == expected
    assert len(made) == len(expected)


def test_evaluation_loaders_keep_the_order_in_large_batches() -> None:
    module = ClientDataModule(client(600, val=numbers(300), test=numbers(6)), batch_size=4)
    assert order(module.statistics_dataloader()) == list(range(600))
    assert batch_sizes(module.statistics_dataloader()) == [256, 256, 88]
    assert order(module.val_dataloader()) == list(range(300))
    assert batch_sizes(module.test_dataloader()) == [6]
    small = ClientDataModule(client(), batch_size=4, evaluation_batch_size=2)
    assert batch_sizes(small.test_dataloader()) == [2, 2, 2]


def test_any_map_style_data_set_gives_the_same_batches() -> None:
    plain = ClientDataModule(client(train=Numbers(11)), batch_size=4, seed=2).train_dataloader()
    for (x, y), (same_x, same_y) in zip(plain, loader(11, seed=2), strict=True):
        assert torch.equal(x, same_x) and torch.equal(y, same_y)


def test_a_tensor_data_set_that_transforms_is_asked_for_single_samples() -> None:
    doubled = Doubled(torch.arange(6.0).unsqueeze(1), torch.arange(6))
    module = ClientDataModule(client(train=doubled), batch_size=4)
    assert order(module.statistics_dataloader()) == [0, 2, 4, 6, 8, 10]


def test_tensor_batches_are_cheap() -> None:
    tensors = TensorDataset(torch.zeros(3200, 1, 8, 8), torch.zeros(3200, dtype=torch.long))
    made = ClientDataModule(client(train=tensors), batch_size=32).train_dataloader()
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        assert sum(1 for _ in made) == 100
        durations.append(time.perf_counter() - start)
    assert min(durations) / 100 < 200e-6  # measured: 30e-6; sample by sample it is above 300e-6


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"evaluation_batch_size": 0}, {"seed": -1}])
def test_client_module_names_a_wrong_argument(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        ClientDataModule(client(), **{"batch_size": 4, **wrong})


class Line(L.LightningModule):
    """Counts what it gets while it fits a line."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)
        self.counts = {"train": 0, "val": 0, "test": 0}

    def _loss(self, batch: Any, role: str) -> Tensor:
        x, y = batch
        self.counts[role] += len(x)
        return torch.nn.functional.cross_entropy(self.layer(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


# On machines with many cores Lightning advises workers, which tensors in memory do not need; and Lightning
# itself still uses a part of torch that is to go.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("kind", [numbers, Numbers])
def test_a_plain_trainer_takes_a_client(kind: Any) -> None:
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = Federation(client(train=kind(9))).client(0)
    line = Line()
    trainer.fit(line, datamodule=module)
    assert trainer.global_step == 4
    trainer.test(line, datamodule=module, verbose=False)
    assert line.counts == {"train": 18, "val": 10, "test": 6}


def test_a_federation_of_ten_lines() -> None:
    class Mine(FederatedDataModule):
        num_classes = 2

        def build_clients(self) -> Iterable[ClientData]:
            for number, pool in enumerate(["unseen", "seen", "seen"]):
                yield ClientData(name=f"mine-{number}", pool=pool, train=numbers(9), val=numbers(2), test=numbers(3))

    mine = Mine(batch_size=4)
    assert mine.pool("seen") == (1, 2) and mine.pool("unseen") == (0,) and mine.pool("pretrain") == ()
    assert mine.input_shape == (1,)
    assert batch_sizes(mine.client(2).train_dataloader()) == [4, 5]
    assert mine.describe()[0] == {
        "client_id": 0,
        "name": "mine-0",
        "pool": "unseen",
        "domain": "all",
        "train": 9,
        "val": 2,
        "test": 3,
        "details": {},
    }


def test_clients_are_built_once() -> None:
    federation = Federation(client())
    federation.setup("fit")
    federation.setup("test")
    assert len(federation.clients) == 1 and federation.builds == 1


def test_the_seed_of_a_client_module_is_that_of_its_order() -> None:
    federation = Federation(client())
    assert order(federation.client(0, seed=7).train_dataloader()) == order(loader(seed=7))


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([client(), client()], "Two clients are called 'a'"),
        ([client(pool="hidden")], "'a' is in pool 'hidden'; the pools are pretrain, seen, unseen"),
        ([client(pool="unseen")], "None of the 1 clients"),
        ([], "None of the 0 clients"),
        ([client(0)], "train set of client 'a' is empty"),
        ([client(val=numbers(0))], "val set of client 'a' is empty"),
        ([client(test=numbers(0))], "test set of client 'a' is empty"),
        ([client(train=Endless())], "train set of client 'a' has no length"),
    ],
)
def test_setup_names_what_is_wrong(clients: list[ClientData], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Federation(*clients).setup()


def test_num_classes_must_be_set() -> None:
    class Forgetful(FederatedDataModule):
        def build_clients(self) -> Iterable[ClientData]:
            return [client()]

    with pytest.raises(DataError, match="Forgetful does not set num_classes"):
        Forgetful().setup()


def test_unknown_pools_and_clients_are_named() -> None:
    federation = Federation(client())
    with pytest.raises(DataError, match=f"'hidden'; the pools are {', '.join(POOLS)}"):
        federation.pool("hidden")
    for client_id in (-1, 1):
        with pytest.raises(DataError, match=f"no client {client_id}; the ids go from 0 to 0"):
            federation.client(client_id)
    with pytest.raises(DataError, match="batch_size is 0"):
        Federation(client(), batch_size=0)
