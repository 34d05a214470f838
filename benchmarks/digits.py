"""A configuration on several seeds: all methods, and what the nets and refinement bring, with intervals.

Run:  python benchmarks/digits.py --seeds 0 1 2 --output runs/digits-seeds
Time: about 4 minutes a seed on a core of its own. Seeds that are there already are not run again.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from fedl2p.experiment.run import run
from fedl2p.report.analysis import paired_bootstrap

BEST = "best fine-tuning"
PAIRS = (
    ("fedl2p", "mean_recipe"),
    ("fedl2p_refined", "mean_recipe"),
    ("fedl2p_refined", "fedl2p"),
    ("mean_recipe", BEST),
    ("fedl2p", BEST),
    ("fedl2p_refined", BEST),
    ("fedl2p_refined", "ft_refined"),
    ("fedl2p", "ft_bn_c_batch"),
    ("fedl2p_refined", "ft_bn_c_batch"),
    ("fedl2p_refined_running", "mean_recipe_running"),
    ("fedl2p", "initial_nets"),
    ("fedl2p", "fedl2p_shuffled"),
    ("fedl2p", "l2p"),
)
Results = dict[str, Any]
"""What a results file holds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/digits-seeds"))
    parser.add_argument("overrides", nargs="*", help="key=value pairs for every run")
    options = parser.parse_intermixed_args()
    results = [_result(options, seed) for seed in options.seeds]
    table = f"{_methods(results)}\n\n{_differences(results)}\n\n{_choices(results)}\n"
    (options.output / "table.md").write_text(table)
    print(table)


def _result(options: argparse.Namespace, seed: int) -> Results:
    folder = options.output / str(seed)
    path = folder / "results.json"
    if not path.exists():
        arguments = [options.config, f"seed={seed}", f"output_dir={folder}", "wandb.enabled=false"]
        run(*arguments, *options.overrides)
    return dict(json.loads(path.read_text()))


def _best(result: Results) -> str:
    """The fine-tuning with the lowest validation loss on the seen clients."""
    losses = {name: method["settings"].get("val_loss") for name, method in result["methods"].items()}
    measured = {name: loss for name, loss in losses.items() if loss is not None}
    return min(measured, key=lambda name: measured[name])


def _values(results: list[Results], method: str, pool: str, key: str = "accuracy") -> list[np.ndarray] | None:
    """Of every client, a row a seed."""
    rows = []
    for result in results:
        found = result["methods"].get(_best(result) if method == BEST else method, {}).get(pool)
        if found is None:
            return None
        values = [client[key] for client in found["clients"].values()]
        rows.append(np.array([math.nan if value is None else value for value in values]))
    return rows


def _methods(results: list[Results]) -> str:
    head = ["method", "seen accuracy", "seen loss", "unseen accuracy", "unseen loss"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- |"]
    for method, content in results[0]["methods"].items():
        cells = [content["label"]]
        for pool in ("seen", "unseen"):
            accuracy, loss = _values(results, method, pool), _values(results, method, pool, "loss")
            if accuracy is None or loss is None:
                cells += ["-", "-"]
            else:
                means, total = [100 * row.mean() for row in accuracy], np.concatenate(loss).mean()
                cells += [f"{np.mean(means):.1f} ± {np.std(means):.1f}"]
                cells += [f"{total:.3f}" if math.isfinite(total) else "not finite"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(results: list[Results]) -> str:
    head = [
        "difference",
        "pool",
        "accuracy, points",
        "over clients",
        "over seeds",
        "loss",
        "over clients",
        "over seeds",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for a, b in PAIRS:
        for pool in ("seen", "unseen"):
            cells = [f"{_label(results, a)} minus {_label(results, b)}", pool]
            for key, scale, digits in (("accuracy", 100, 2), ("loss", 1, 3)):
                own, other = _values(results, a, pool, key), _values(results, b, pool, key)
                if own is not None and other is not None:
                    rows = [scale * (x - y) for x, y in zip(own, other, strict=True)]
                    cells += _intervals(rows, digits)
            if len(cells) == len(head):
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _label(results: list[Results], method: str) -> str:
    return str(results[0]["methods"].get(method, {}).get("label", method))


def _intervals(rows: list[np.ndarray], digits: int) -> list[str]:
    """The mean over all clients; 95 % intervals by a bootstrap over clients, and by Student's t over seeds."""
    if not all(np.isfinite(row).all() for row in rows):
        return ["not finite", "", ""]
    mean, low, high = paired_bootstrap(np.concatenate(rows), seed=0)
    seeds = np.array([row.mean() for row in rows])
    over_seeds = "-"
    if len(seeds) > 1:
        width = student.ppf(0.975, len(seeds) - 1) * seeds.std(ddof=1) / math.sqrt(len(seeds))
        over_seeds = f"{seeds.mean() - width:+.{digits}f} to {seeds.mean() + width:+.{digits}f}"
    return [f"{mean:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}", over_seeds]


def _choices(results: list[Results]) -> str:
    """How often which fine-tuning was the best, and which method was recommended, both by validation data."""
    best = Counter(_label([result], _best(result)) for result in results)
    advised = Counter(_label([r], r["recommended"]["method"]) if r.get("recommended") else "nothing" for r in results)
    lines = []
    for what, counts in ((f"The {BEST}", best), ("Recommended", advised)):
        lines.append(f"{what}: {', '.join(f'{name} ({count})' for name, count in counts.most_common())}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
