"""`fedl2p inspect`: the hyperparameters of chosen clients as a table, CSV or JSON."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedl2p.errors import RunFolderError
from fedl2p.report.hyperparameters import COLUMNS, read_hyperparameters

Format = Literal["table", "csv", "json"]
MAX_COLUMNS = 6  # clients that stand beside each other in a table; of more their spread is shown


def show_hyperparameters(
    folder: str | os.PathLike[str],
    *,
    clients: Sequence[str] = (),
    pool: str | None = None,
    domain: str | None = None,
    kind: str | None = None,
    form: Format = "table",
) -> str:
    """The text that `fedl2p inspect` prints.

    Args:
        folder: of a run that has come to its end.
        clients: names; empty is all.
        pool: only clients of it; None is any.
        domain: likewise.
        kind: `beta` or `eta`; None is both.
        form: `table`: a row a layer and a column a client, or the spread over the clients where there are more than
            `MAX_COLUMNS`; `csv`: the rows of `hyperparameters.csv`; `json`: an object by client with `domain`, `pool`,
            `beta` and `eta`, the latter two by layer.

    Raises:
        RunFolderError: there is no table of hyperparameters, no such client, or none that is asked for.
    """
    path = Path(folder) / "hyperparameters.csv"
    if not path.is_file():
        raise RunFolderError(f"'{folder}' has no hyperparameters.csv; a run writes it at its end.")
    rows = choose(read_hyperparameters(path), clients=clients, pool=pool, domain=domain, kind=kind)
    if not rows:
        raise RunFolderError(f"No row of {path} fits; its pools and domains are {_groups(path)}.")
    return {"table": _as_table, "csv": _as_csv, "json": _as_json}[form](rows)


def choose(
    rows: Sequence[Mapping[str, Any]],
    *,
    clients: Sequence[str] = (),
    pool: str | None = None,
    domain: str | None = None,
    kind: str | None = None,
) -> list[Mapping[str, Any]]:
    """The rows of the chosen clients, in the order of the table.

    Raises:
        RunFolderError: there is no client of such a name.
    """
    known = dict.fromkeys(str(row["client"]) for row in rows)
    for name in clients:
        if name not in known:
            begin = ", ".join(list(known)[:3])
            raise RunFolderError(f"There is no client '{name}'; the {len(known)} clients are called {begin}, ...")
    wanted = {"pool": pool, "domain": domain, "kind": kind}
    return [
        row
        for row in rows
        if (not clients or row["client"] in clients)
        and all(value is None or row[key] == value for key, value in wanted.items())
    ]


def _groups(path: Path) -> str:
    found = dict.fromkeys((row["pool"], row["domain"]) for row in read_hyperparameters(path))
    return ", ".join(f"{pool} {domain}" for pool, domain in found)


def _as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _as_json(rows: Iterable[Mapping[str, Any]]) -> str:
    clients: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = clients.setdefault(row["client"], {"domain": row["domain"], "pool": row["pool"]})
        value = row["value"] if math.isfinite(row["value"]) else None
        own.setdefault(row["kind"], {})[row["layer"]] = value
    return json.dumps(clients, indent=2, allow_nan=False) + "\n"


def _as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(str(row["client"]) for row in rows))
    layers: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        layers.setdefault((row["kind"], row["layer"]), {})[str(row["client"])] = row["value"]
    few = len(names) <= MAX_COLUMNS
    table = Table(title=", ".join(_described(rows)) if few else f"{len(names)} clients", box=SIMPLE_HEAD)
    table.add_column("")
    table.add_column("layer", no_wrap=True)
    for title in names if few else ("min", "quarter", "median", "three quarters", "max"):
        table.add_column(Text(title), justify="right")
    for (kind, layer), values in layers.items():
        own = [values.get(name, math.nan) for name in names]
        numbers = own if few else list(np.quantile(own, (0, 0.25, 0.5, 0.75, 1)))
        table.add_row(kind, Text(layer), *(f"{value:.4g}" for value in numbers))
    console = Console(width=max(Console().width, 40 + 14 * len(table.columns)))
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _described(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(f"{row['client']} ({row['domain']}, {row['pool']})" for row in rows))
