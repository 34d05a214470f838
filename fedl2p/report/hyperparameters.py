"""The clients' recipes as a long table: a row for each client, kind and layer."""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedl2p.errors import ModelError, RunFolderError
from fedl2p.io import write_atomically

if TYPE_CHECKING:  # reading a table needs no torch
    from fedl2p.core.meta_nets import Hyperparameters

COLUMNS = ("client", "domain", "pool", "kind", "layer", "value")


class Described(Protocol):
    """Who a client is; `fedl2p.datamodules.ClientData` fits."""

    @property
    def name(self) -> str:
        """Unique in the federation."""

    @property
    def domain(self) -> str:
        """Where its data come from."""

    @property
    def pool(self) -> str:
        """`seen` or `unseen`."""


class Named(Protocol):
    """What the entries of a recipe speak of; `MetaNets` fits."""

    batchnorm_names: tuple[str, ...]
    parameter_names: tuple[str, ...]


def hyperparameter_rows(
    clients: Sequence[Described], recipes: "Sequence[Hyperparameters]", meta_nets: Named
) -> list[dict[str, Any]]:
    """The recipes in long form, clients in the given order, layers in the model's.

    Args:
        clients: who they are.
        recipes: one a client, in the same order: beta (B,) and eta (P,).
        meta_nets: has the B and P names.

    Returns:
        Rows with `client`, `domain`, `pool`, `kind` (beta or eta), `layer` (a batch norm's or a parameter tensor's
        name) and `value` (float).

    Raises:
        ModelError: not a recipe for each client, or one that does not fit the names.
    """
    if len(clients) != len(recipes):
        raise ModelError(f"There are {len(recipes)} recipes for {len(clients)} clients; one each is needed.")
    rows: list[dict[str, Any]] = []
    for client, recipe in zip(clients, recipes, strict=True):
        who = {"client": client.name, "domain": client.domain, "pool": client.pool}
        named = named_values(recipe, meta_nets, whose=f"client '{client.name}'")
        rows += [{**who, "kind": kind, "layer": name, "value": value} for kind, name, value in named]
    return rows


def named_values(
    recipe: "Hyperparameters", names: Named, *, whose: str = "the client"
) -> Iterator[tuple[str, str, float]]:
    """Every entry of a recipe as (kind, name, value): beta of each batch norm, then eta of each parameter tensor.

    Args:
        recipe: beta (B,) and eta (P,).
        names: has the B and P names.
        whose: the recipe is, for the error.

    Raises:
        ModelError: the recipe does not fit the names.
    """
    for kind, own, values in (
        ("beta", names.batchnorm_names, recipe.beta),
        ("eta", names.parameter_names, recipe.eta),
    ):
        if tuple(values.shape) != (len(own),):
            raise ModelError(f"{kind} of {whose} has the shape {tuple(values.shape)}, but there are {len(own)} names.")
        # One transfer for the whole vector: reading entry by entry would wait for the device each time.
        for name, value in zip(own, values.detach().cpu().tolist(), strict=True):
            yield kind, name, value


def write_hyperparameters(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes the rows as CSV with a header, whole or not at all.

    Args:
        path: the file, usually `<run>/hyperparameters.csv`.
        rows: of `hyperparameter_rows`.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomically(path, text.getvalue())


def read_hyperparameters(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows that `write_hyperparameters` wrote, with the same values.

    Raises:
        RunFolderError: the file cannot be read, or is another table.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise RunFolderError(f"{path} has the columns {reader.fieldnames}; needed are {list(COLUMNS)}.")
            return [{**row, "value": float(row["value"])} for row in reader]
    except (OSError, ValueError) as error:
        raise RunFolderError(f"Cannot read {path}: {error}.") from error
