"""All speed benchmarks in their short form; writes benchmarks/results.json and prints the table.

Run:  make bench
Time: 6 minutes on 2 cores.
"""

import argparse
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from benchmarks.speed import client_update, estimators, inner_step, rounds, startup, statistics
from benchmarks.speed.measure import machine, table

OUTPUT = Path(__file__).parents[1] / "results.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes of the paper, and more repeats")
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for module in (startup, statistics, inner_step, estimators, client_update, rounds):
        print(f"{module.__name__} ...", flush=True)
        rows += module.measure(not options.full)
    content = {"machine": machine(), "date": date.today().isoformat(), "rows": [asdict(row) for row in rows]}
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    options.output.with_suffix(".md").write_text(f"{machine()}, {content['date']}\n\n{table(rows)}\n")
    print(f"{machine()}\n\n{table(rows)}\n\n{options.output}")


if __name__ == "__main__":
    main()
