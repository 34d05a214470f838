"""Methods in rows, pools in columns: the headline, for the terminal and for others to draw."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from fedl2p.pools import MEASURED_POOLS

NOTHING = "–"  # noqa: RUF001 (an en dash for a cell without a value)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one pool.

    Attributes:
        accuracy: mean over clients, 0 to 1.
        sd: of the accuracy over clients.
        loss: mean over clients.
        count: number of clients.
        best: whether no method has a higher accuracy on this pool.
    """

    accuracy: float
    sd: float
    loss: float
    count: int
    best: bool = False

    @property
    def text(self) -> str:
        """Such as `81.3 ± 4.2`, in %; without the SD where there is none."""
        sd = f" ± {100 * self.sd:.1f}" if math.isfinite(self.sd) else ""
        return f"{100 * self.accuracy:.1f}{sd}" if math.isfinite(self.accuracy) else NOTHING


def method_label(results: Mapping[str, Any], method: str) -> str:
    """The method's name for people; its key where it has none."""
    entry = (results.get("methods") or {}).get(method) or {}
    return str(entry.get("label") or method)


def pool_names(results: Mapping[str, Any]) -> list[str]:
    """The pools that any method was measured on: seen, unseen, then others by name."""
    found = {
        key
        for entry in (results.get("methods") or {}).values()
        for key, value in (entry or {}).items()
        if isinstance(value, Mapping) and "accuracy" in value
    }
    return [name for name in MEASURED_POOLS if name in found] + sorted(found - set(MEASURED_POOLS))


def cells(results: Mapping[str, Any]) -> dict[str, dict[str, Cell]]:
    """What the results hold, by method (in their order) and pool; what was not measured is missing.

    Args:
        results: as in `results.json`; numbers may be missing, None or NaN.
    """
    found: dict[str, dict[str, Cell]] = {name: {} for name in results.get("methods") or {}}
    for pool in pool_names(results):
        measured = {name: _cell(results, name, pool) for name in found}
        real = [cell for name, cell in measured.items() if cell and name != "oracle"]  # it has seen the test data
        top = max((cell.accuracy for cell in real if math.isfinite(cell.accuracy)), default=math.nan)
        for name, cell in measured.items():
            if cell is not None:
                values = {**cell.__dict__, "best": cell.accuracy == top and name != "oracle"}
                found[name][pool] = Cell(**values)
    return found


def plain_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The table as text: a header, then a method a row with its accuracy in % ± SD on each pool."""
    pools = pool_names(results)
    rows = [["Method", *pools]]
    for name, row in cells(results).items():
        rows.append([method_label(results, name), *(row[pool].text if pool in row else NOTHING for pool in pools)])
    return rows


def methods_table(results: Mapping[str, Any]) -> Table:
    """The table for a rich console, the best method of each pool in bold.

    Args:
        results: as in `results.json`.
    """
    pools = pool_names(results)
    table = Table(title="Accuracy after personalization (%, mean ± SD over clients)")
    table.add_column("Method")
    measured = cells(results)
    for pool in pools:
        count = max((row[pool].count for row in measured.values() if pool in row), default=0)
        table.add_column(Text(f"{pool} ({count} clients)" if count else pool), justify="right")
    for name, row in measured.items():
        texts = [
            Text(row[pool].text, style="bold" if row[pool].best else "") if pool in row else Text(NOTHING)
            for pool in pools
        ]
        table.add_row(Text(method_label(results, name)), *texts)
    return table


def number(value: Any) -> float:
    """A float from what a results file may hold: NaN for None and for what is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def _cell(results: Mapping[str, Any], method: str, pool: str) -> Cell | None:
    measured = (results["methods"][method] or {}).get(pool)
    if not isinstance(measured, Mapping) or "accuracy" not in measured:
        return None
    accuracy, loss = measured.get("accuracy") or {}, measured.get("loss") or {}
    return Cell(
        accuracy=number(accuracy.get("mean")),
        sd=number(accuracy.get("sd")),
        loss=number(loss.get("mean")),
        count=len(measured.get("clients") or {}),
    )
