"""All speed benchmarks in their short form; writes benchmarks/results.json and prints the table.

Run:  make bench
Time: 6 minutes on 2 cores.
"""

from pathlib import Path

from benchmarks.speed import client_update, estimators, inner_step, rounds, startup, statistics
from benchmarks.speed.measure import Row, command

OUTPUT = Path(__file__).parents[1] / "results.json"


def measure(quick: bool) -> list[Row]:
    """All of them, one after the other."""
    rows = []
    for module in (startup, statistics, inner_step, estimators, client_update, rounds):
        print(f"{module.__name__} ...", flush=True)
        rows += module.measure(quick)
    return rows


if __name__ == "__main__":
    command(__doc__, measure, output=OUTPUT)
