"""A user's own arrays: from a file or as they are, with columns that say who has what."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_round import run_one_round
from safetensors.torch import save_file
from tiny_data import tensors

from fedl2p.datamodules import ClientData, TensorsDataModule
from fedl2p.datamodules.base.arrays import labels_of
from fedl2p.errors import DataError

ROLES = ("train", "val", "test")


def rows(client: ClientData) -> dict[str, list[int]]:
    return {role: getattr(client, role).rows.tolist() for role in ROLES}


def numbers(columns: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Columns as tensors, with text as numbers."""
    return {
        name: torch.from_numpy(np.unique(column, return_inverse=True)[1] if column.dtype.kind == "U" else column)
        for name, column in columns.items()
    }


def test_a_client_has_the_samples_of_its_column() -> None:
    columns = tensors.columns()
    order = np.random.default_rng(0).permutation(90)  # a user's rows come in any order
    columns = {name: column[order] for name, column in columns.items()}
    module = TensorsDataModule(**columns)
    module.prepare_data()
    module.setup()
    assert module.num_classes == 3 and module.input_shape == (1, 8, 8)
    assert [client.name for client in module.clients] == ["0", "1", "2", "3", "4", "5"]
    assert [client.domain for client in module.clients] == ["north", "south"] * 3
    for number, client in enumerate(module.clients):
        own = sorted(row for role in ROLES for row in rows(client)[role])
        assert own == np.flatnonzero(columns["client"] == number).tolist()
        assert [len(rows(client)[role]) for role in ROLES] == [10, 2, 3]
        inputs, labels = client.train[[0]]
        assert torch.equal(inputs[0], torch.from_numpy(columns["inputs"][rows(client)["train"][0]]))
        assert labels[0] == columns["labels"][rows(client)["train"][0]]


def test_clients_are_held_out_by_the_seed_in_each_domain() -> None:
    columns = tensors.columns(clients=24, each=6)
    pools = []
    for seed in (0, 0, 1):
        module = TensorsDataModule(**columns, seed=seed, unseen_fraction=0.25, pretrain_fraction=0.5)
        assert [len(module.pool(pool)) for pool in ("pretrain", "seen", "unseen")] == [12, 6, 6]
        for pool, count in (("pretrain", 6), ("seen", 3), ("unseen", 3)):
            assert [module.clients[i].domain for i in module.pool(pool)].count("north") == count
        pools.append([client.pool for client in module.clients])
    assert pools[0] == pools[1] != pools[2]


@pytest.mark.parametrize("as_numbers", [False, True])
def test_columns_of_pools_and_roles(as_numbers: bool) -> None:
    columns = tensors.columns()
    pool, role = np.array([1, 2, 1, 0, 1, 2])[columns["client"]], np.arange(90) % 5 // 2
    names = (np.array(["pretrain", "seen", "unseen"])[pool], np.array(ROLES)[role])
    columns["pool"], columns["role"] = (pool, role) if as_numbers else names
    module = TensorsDataModule(**columns, unseen_fraction=0.9)
    assert [client.pool for client in module.clients] == ["seen", "unseen", "seen", "pretrain", "seen", "unseen"]
    for client in module.clients:
        for number, name in enumerate(ROLES):
            assert all(role[row] == number for row in rows(client)[name])
        assert [len(rows(client)[name]) for name in ROLES] == [6, 6, 3]


def test_without_a_column_of_domains_there_is_one_and_clients_may_have_names() -> None:
    columns = tensors.columns()
    del columns["domain"]
    columns["client"] = np.array(["e", "d", "c", "b", "a", "f"])[columns["client"]]
    module = TensorsDataModule(**columns)
    assert [client.name for client in module.clients] == list("abcdef")
    assert {client.domain for client in module.clients} == {"all"}


def test_numbers_of_clients_keep_their_order() -> None:
    columns = tensors.columns(clients=12, each=5)
    assert [client.name for client in TensorsDataModule(**columns).clients] == [str(i) for i in range(12)]


def test_bytes_are_scaled_and_normalized() -> None:
    columns = tensors.columns()
    columns["inputs"] = np.full((90, 2, 4), 255, dtype=np.uint8)
    module = TensorsDataModule(**columns, mean=[0.5, 0.0], std=[0.25, 1.0])
    assert module.clients[0].train[0][0].tolist() == [[2.0] * 4, [1.0] * 4]


def test_the_number_of_classes_may_be_given() -> None:
    module = TensorsDataModule(**tensors.columns(), num_classes=7)
    module.setup()
    assert module.num_classes == 7
    module = TensorsDataModule(**tensors.columns(), num_classes=2)
    with pytest.raises(DataError, match="There is a label 2, but num_classes is 2"):
        module.setup()


def write(path: Path, columns: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **columns)
    elif path.suffix == ".safetensors":
        save_file({name: column.contiguous() for name, column in numbers(columns).items()}, path)
    else:
        torch.save({**numbers(columns), "domain": columns["domain"].tolist()}, path)
    return path


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt", "pth"])
def test_files_of_all_kinds_give_the_same_clients(tmp_path: Path, suffix: str) -> None:
    module = TensorsDataModule(write(tmp_path / f"mine.{suffix}", tensors.columns()))
    module.prepare_data()
    plain = TensorsDataModule(**tensors.columns())
    for mine, other in zip(module.clients, plain.clients, strict=True):
        assert (mine.name, mine.pool, rows(mine)) == (other.name, other.pool, rows(other))
        assert np.array_equal(labels_of(mine.train), labels_of(other.train))
    domains = ["0", "1"] if suffix == "safetensors" else ["north", "south"]  # which has no text
    assert [client.domain for client in module.clients] == domains * 3


def test_columns_may_have_other_names_and_the_file_other_arrays(tmp_path: Path) -> None:
    columns = tensors.columns()
    columns = {"x": columns["inputs"], "y": columns["labels"], "hospital": columns["client"], "extra": np.zeros(2)}
    path = write(tmp_path / "mine.npz", columns)
    keys = {"inputs": "x", "labels": "y", "client": "hospital"}
    assert len(TensorsDataModule(path, keys=keys).clients) == 6
    with pytest.raises(DataError, match=r"mine\.npz has no 'inputs'; it has extra, hospital, x, y"):
        TensorsDataModule(path).setup()
    with pytest.raises(DataError, match="has no 'region'"):
        TensorsDataModule(path, keys={**keys, "domain": "region"}).setup()


def nan(columns: dict[str, Any]) -> None:
    columns["inputs"][47, 0, 3, 3] = np.nan


def infinite(columns: dict[str, Any]) -> None:
    columns["inputs"][0, 0, 0, 0] = np.inf


def pairs(columns: dict[str, Any]) -> None:
    columns["client"], columns["domain"] = np.arange(90) // 2, np.arange(90) * 0


def changed(name: str, value: Any) -> Any:
    def change(columns: dict[str, Any]) -> None:
        columns[name] = value(columns) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (nan, "Sample 47, of client '3', has inputs that are not finite"),
        (infinite, "Sample 0, of client '0'"),
        (changed("labels", lambda c: c["labels"][:-1]), "There are 90 inputs, but 89 values in the column 'labels'"),
        (changed("client", lambda c: c["client"][:7]), "but 7 values in the column 'client'"),
        (changed("domain", lambda c: c["domain"][:7]), "but 7 values in the column 'domain'"),
        (changed("labels", lambda c: c["labels"] + 0.5), "'labels' has 90 values of type float64 from 0.5"),
        (changed("labels", lambda c: c["labels"] - 1), "of type int64 from -1"),
        (changed("labels", lambda c: c["labels"][:, None]), r"'labels' has shape \(90, 1\)"),
        (changed("labels", lambda c: [None] * 90), "type object"),
        (changed("client", lambda c: c["client"] / 2), "'client' is of type float64"),
        (pairs, "Client '0': A client has 2 samples; it needs at least 3"),
        (changed("domain", lambda c: np.arange(90) // 20), "Client '1' has 0 and 1 in the column 'domain'"),
        (changed("pool", lambda c: np.arange(90) % 2), "Client '0' has pretrain and seen in the column 'pool'"),
        (changed("pool", lambda c: ["test"] * 90), "'pool' has the value test; allowed are pretrain, seen, unseen"),
        (changed("pool", lambda c: [3] * 90), "'pool' has the value 3; allowed are .* or 0 to 2"),
        (changed("role", lambda c: ["train"] * 90), "The val set of client '0' is empty"),
        (changed("role", lambda c: ["valid"] * 90), "'role' has the value valid"),
        (changed("inputs", lambda c: np.zeros(90, np.float32)), r"type torch.float32 and shape \(90,\)"),
        (changed("inputs", lambda c: np.zeros((90, 5), np.int64)), "type torch.int64"),
    ],
)
@pytest.mark.parametrize("from_file", [False, True])
def test_what_is_wrong_in_a_column_is_named(tmp_path: Path, from_file: bool, break_it: Any, message: str) -> None:
    columns: dict[str, Any] = tensors.columns()
    break_it(columns)
    if from_file and not any(np.asarray(column).dtype == object for column in columns.values()):
        module = TensorsDataModule(write(tmp_path / "mine.npz", columns))
    else:
        module = TensorsDataModule(**columns)
    with pytest.raises(DataError, match=message):
        module.setup()


class Danger:
    """Unpickling it would write a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("danger"),))


def test_files_that_cannot_be_read_are_named_and_no_code_in_them_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cut.npz", "cut.safetensors", "cut.pt"):
        whole = write(tmp_path / name, tensors.columns())
        whole.write_bytes(whole.read_bytes()[:1000])
    torch.save({"inputs": Danger()}, "danger.pt")
    Path("danger.pth").write_bytes(pickle.dumps(Danger()))
    np.savez("danger.npz", inputs=np.array([Danger()], dtype=object), labels=[0], client=[0])
    for name in ("cut.npz", "cut.safetensors", "cut.pt", "danger.pt", "danger.pth", "danger.npz"):
        with pytest.raises(DataError, match=rf"{name} (cannot be read: \S|is no complete)"):
            TensorsDataModule(name).setup()
    assert not Path("danger").exists()
    torch.save([1, 2], "list.pt")
    with pytest.raises(DataError, match=r"list\.pt holds a list"):
        TensorsDataModule("list.pt").setup()
    Path("mine.csv").touch()
    with pytest.raises(DataError, match=r"suffix '\.csv'; the file must be one of \.npz"):
        TensorsDataModule("mine.csv").setup()
    with pytest.raises(DataError, match=r"There is no file gone\.npz"):
        TensorsDataModule("gone.npz").prepare_data()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "Give either path, or inputs, labels and client"),
        ({"path": "a.npz", "labels": [0]}, "Give either path, or"),
        ({"path": "a.npz", "keys": {"x": "y"}}, "keys has 'x'; the columns are inputs"),
        ({"path": "a.npz", "num_classes": 0}, "num_classes is 0"),
        ({"path": "a.npz", "unseen_fraction": 1.0}, "unseen_fraction is 1.0"),
        ({"path": "a.npz", "unseen_fraction": -0.1}, "unseen_fraction is -0.1"),
        ({"path": "a.npz", "val_fraction": 0.0}, "val_fraction is 0.0"),
        ({"path": "a.npz", "test_fraction": 1.0}, "test_fraction is 1.0"),
    ],
)
def test_wrong_arguments_are_named_at_once(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TensorsDataModule(**wrong)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match="There is no column 'client'"):
        TensorsDataModule(inputs=torch.zeros(3, 1), labels=[0, 1, 2]).setup()


def test_a_round_of_training(tmp_path: Path) -> None:
    arguments = {"path": str(write(tmp_path / "mine.npz", tensors.columns()))}
    methods = run_one_round("fedl2p.datamodules.TensorsDataModule", arguments, tmp_path / "run", num_classes=3)
    assert len(methods["fedl2p"]["seen"]["clients"]) == 4 and len(methods["fedl2p"]["unseen"]["clients"]) == 2
