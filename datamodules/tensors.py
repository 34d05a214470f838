"""A user's own arrays: samples, their labels, and columns that say who has them."""

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedl2p.datamodules.base.arrays import ArrayDataset, Arrays
from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.datamodules.base.partition import IntArray, client_roles, stratified_roles
from fedl2p.datamodules.base.split import Split
from fedl2p.errors import DataError
from fedl2p.pools import POOLS, ROLES

COLUMNS = ("inputs", "labels", "client", "domain", "pool", "role")
_REQUIRED = COLUMNS[:3]
_CHUNK = 4096


class TensorsDataModule(FederatedDataModule):
    """Arrays with a row a sample, from a file or as they are; a column says which client has which row.

    Columns of clients and domains hold whole numbers or text. Those of pools and roles hold their names, or their
    positions in pretrain, seen, unseen and in train, val, test: safetensors have no text. A client belongs to one
    domain and to one pool.

    Attributes:
        num_classes: As given, or the largest label plus 1; set by `setup`.

    Args:
        path: An `.npz`, `.safetensors`, `.pt` or `.pth` file with the columns; nothing in it is unpickled as code. None
            where the columns are given.
        inputs: Shape (n, channels, ...), bytes or floating point. Bytes are scaled to [0, 1].
        labels: Class numbers from 0, shape (n,).
        client: Who has the sample, shape (n,).
        domain: Of the client, shape (n,); None calls all ``all``.
        pool: Of the client, shape (n,); None holds clients out by the two fractions below.
        role: Of the sample, shape (n,); None splits each client's samples, with the same labels in each role.
        keys: Other names of columns in the file, such as ``{"inputs": "x", "client": "hospital"}``.
        num_classes: How many classes there are; None counts up to the largest label.
        mean: Taken off each channel.
        std: Each channel is divided by this.
        **options: `batch_size`, and the words of `Split` in `split_keys`, for pools and roles that no column gives.

    Raises:
        DataError: If an argument is not as above. `setup` raises it when the file or a column is missing or of a wrong
            kind, lengths differ, an input is not finite, or a client has too few samples.
    """

    split = Split(unseen_fraction=0.25)
    split_keys = ("seed", "unseen_fraction", "pretrain_fraction", "val_fraction", "test_fraction")

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        inputs: Tensor | NDArray[Any] | None = None,
        labels: ArrayLike | Tensor | None = None,
        client: ArrayLike | Tensor | None = None,
        domain: ArrayLike | Tensor | None = None,
        pool: ArrayLike | Tensor | None = None,
        role: ArrayLike | Tensor | None = None,
        keys: Mapping[str, str] | None = None,
        num_classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given = (inputs, labels, client, domain, pool, role)
        self.columns = {name: column for name, column in zip(COLUMNS, given, strict=True) if column is not None}
        self.path = None if path is None else Path(path).expanduser()
        if (self.path is None) == (not self.columns):
            raise DataError("Give either path, or inputs, labels and client.")
        self.keys = dict(keys or {})
        unknown = [name for name in self.keys if name not in COLUMNS]
        if unknown:
            raise DataError(f"keys has {unknown[0]!r}; the columns are {', '.join(COLUMNS)}.")
        if num_classes is not None and num_classes < 1:
            raise DataError(f"num_classes is {num_classes}; it must be at least 1.")
        self._wanted_classes = num_classes
        self.mean, self.std = mean, std

    def prepare_data(self) -> None:
        """Looks for the file.

        Raises:
            DataError: If it is not there.
        """
        if self.path is not None and not self.path.is_file():
            raise DataError(f"There is no file {self.path}; name one by data.init_args.path.")

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks the columns, and builds the clients, at the first call.

        Args:
            stage: Ignored.

        Raises:
            DataError: See the class and `FederatedDataModule.setup`.
        """
        if self._clients is None:
            self.prepare_data()
            self._table = self._checked_table()
            largest = int(self._table["labels"].max())
            self.num_classes = largest + 1 if self._wanted_classes is None else self._wanted_classes
            if largest >= self.num_classes:
                raise DataError(f"There is a label {largest}, but num_classes is {self.num_classes}.")
        super().setup(stage)

    def build_clients(self) -> Iterable[ClientData]:
        """The clients, by their names' order."""
        table = self._table
        arrays = Arrays(table["inputs"], table["labels"], mean=self.mean, std=self.std)
        names, owner = np.unique(table["client"], return_inverse=True)
        domains = _of_clients("domain", table.get("domain", np.full(len(owner), "all")), owner, names)
        pools = self._pools(owner, names, domains)
        for number, name in enumerate(names):
            rows = np.flatnonzero(owner == number)
            roles = self._roles(rows, str(name), number)
            sets = {role: ArrayDataset(arrays, own) for role, own in zip(ROLES, roles, strict=True)}
            yield ClientData(
                name=str(name),
                pool=pools[number],
                domain=str(domains[number]),
                details={"size": float(len(sets["train"]))},
                **sets,
            )

    def _pools(self, owner: IntArray, names: NDArray[Any], domains: NDArray[Any]) -> list[str]:
        """Each client's pool: as the column says, or by the fractions, in each domain alike."""
        if "pool" in self._table:
            return [str(pool) for pool in _of_clients("pool", self._table["pool"], owner, names)]
        split = self.split
        kinds = np.unique(domains, return_inverse=True)[1].astype(np.int64)
        pretrain, unseen = stratified_roles(kinds, (split.pretrain_fraction, split.unseen_fraction), self.rng(0))
        pools = ["seen"] * len(names)
        for pool, members in (("pretrain", pretrain), ("unseen", unseen)):
            for member in members:
                pools[member] = pool
        return pools

    def _roles(self, rows: IntArray, name: str, number: int) -> list[IntArray]:
        """A client's rows by role."""
        if "role" in self._table:
            own = self._table["role"][rows]
            return [rows[own == role] for role in ROLES]
        labels, split = self._table["labels"][rows], self.split
        try:
            parts = client_roles(labels, split.val_share, split.test_fraction, self.rng(1, number))
        except DataError as error:
            raise DataError(f"Client {name!r}: {error}") from error
        return [rows[part] for part in parts]

    def _checked_table(self) -> dict[str, Any]:
        columns = self.columns if self.path is None else _read(self.path, self.keys)
        missing = [name for name in _REQUIRED if name not in columns]
        if missing:
            key = self.keys.get(missing[0], missing[0])
            raise DataError(f"There is no column {key!r}{'' if self.path is None else f' in {self.path}'}.")
        inputs = torch.as_tensor(columns["inputs"])
        table: dict[str, Any] = {"inputs": inputs, "labels": _whole("labels", columns["labels"])}
        table |= {name: _text(name, columns[name]) for name in ("client", "domain") if name in columns}
        for name, allowed in (("pool", POOLS), ("role", ROLES)):
            if name in columns:
                table[name] = _named(name, columns[name], allowed)
        for name, column in table.items():
            if len(column) != len(inputs):
                raise DataError(f"There are {len(inputs)} inputs, but {len(column)} values in the column {name!r}.")
        _check_inputs(inputs, table["client"])
        return table


def _read(path: Path, keys: Mapping[str, str]) -> dict[str, Any]:
    """The columns in a file, by our names."""
    readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        ".pt": _read_torch,
        ".pth": _read_torch,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has the suffix {path.suffix!r}; the file must be one of {', '.join(readers)}.")
    try:
        found = reader(path)
    except DataError:
        raise
    except Exception as error:  # the three libraries have no common error for a broken file
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path} cannot be read: {reason}") from error
    named = {name: keys.get(name, name) for name in COLUMNS}
    absent = [key for name, key in named.items() if (name in keys or name in _REQUIRED) and key not in found]
    if absent:
        raise DataError(f"{path} has no {absent[0]!r}; it has {', '.join(sorted(found))}.")
    return {name: found[key] for name, key in named.items() if key in found}


def _read_npz(path: Path) -> Mapping[str, Any]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is no complete .npz file.")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: Path) -> Mapping[str, Any]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}; it must hold a dict of columns.")
    return found


def _column(name: str, values: ArrayLike | Tensor) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.ndim != 1:
        raise DataError(f"The column {name!r} has shape {array.shape}; it must have one value a sample.")
    return array


def _whole(name: str, values: ArrayLike | Tensor) -> IntArray:
    array = _column(name, values)
    if array.dtype.kind not in "iu" or not len(array) or array.min() < 0:
        least = f" from {array.min()}" if array.dtype.kind in "iuf" and len(array) else ""
        raise DataError(
            f"The column {name!r} has {len(array)} values of type {array.dtype}{least}; it must have whole numbers "
            "from 0."
        )
    return array.astype(np.int64)


def _text(name: str, values: ArrayLike | Tensor) -> NDArray[Any]:
    """Whole numbers or text, as they are, so that numbers keep their order."""
    array = _column(name, values)
    if array.dtype.kind not in "iuU":
        raise DataError(f"The column {name!r} is of type {array.dtype}; it must have whole numbers or text.")
    return array


def _named(name: str, values: ArrayLike | Tensor, allowed: Sequence[str]) -> NDArray[Any]:
    array = _text(name, values)
    numbers = array.dtype.kind != "U"
    wrong = [value for value in np.unique(array) if value not in (range(len(allowed)) if numbers else allowed)]
    if wrong:
        choices = f"{', '.join(allowed)}, or 0 to {len(allowed) - 1}"
        raise DataError(f"The column {name!r} has the value {wrong[0]}; allowed are {choices}.")
    return np.array(allowed)[array] if numbers else array


def _of_clients(name: str, column: NDArray[Any], owner: IntArray, names: NDArray[Any]) -> NDArray[Any]:
    """The one value that each client has in a column, shape (clients,)."""
    first = np.unique(owner, return_index=True)[1]
    values = column[first]
    differing = np.flatnonzero(column != values[owner])
    if len(differing):
        row = differing[0]
        raise DataError(
            f"Client {str(names[owner[row]])!r} has {values[owner[row]]} and {column[row]} in the column {name!r}; "
            "a client has one."
        )
    return values


def _check_inputs(inputs: Tensor, clients: NDArray[Any]) -> None:
    if inputs.dim() < 2 or not (inputs.dtype == torch.uint8 or inputs.is_floating_point()):
        raise DataError(
            f"The inputs are of type {inputs.dtype} and shape {tuple(inputs.shape)}; they must be bytes (uint8) or "
            "floating point, of shape (samples, channels, ...)."
        )
    if inputs.dtype == torch.uint8:
        return
    for start in range(0, len(inputs), _CHUNK):
        finite = inputs[start : start + _CHUNK].to(torch.float32).flatten(1).isfinite().all(dim=1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise DataError(
                f"Sample {row}, of client {str(clients[row])!r}, has inputs that are not finite in float32."
            )
