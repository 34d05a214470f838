"""configs/digits.yaml on several seeds: all methods, and FedL2P's differences with intervals over all clients.

Run:  python benchmarks/digits.py --seeds 0 1 2 --output runs/digits-seeds
Time: about 3 minutes a seed on 2 cores.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from fedl2p.experiment.run import run
from fedl2p.report.analysis import paired_bootstrap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/digits-seeds"))
    parser.add_argument("overrides", nargs="*", help="key=value pairs for every run")
    options = parser.parse_intermixed_args()
    results = [_result(options, seed) for seed in options.seeds]
    table = f"{_methods(results)}\n\n{_differences(results)}\n"
    (options.output / "table.md").write_text(table)
    print(table)


def _result(options: argparse.Namespace, seed: int) -> dict[str, object]:
    folder = options.output / str(seed)
    path = folder / "results.json"
    if not path.exists():
        arguments = [options.config, f"seed={seed}", f"output_dir={folder}", "wandb.enabled=false"]
        run(*arguments, *options.overrides)
    return dict(json.loads(path.read_text()))


def _values(results: list[dict[str, object]], method: str, pool: str, key: str = "accuracy") -> np.ndarray | None:
    """Of every client in every seed."""
    found = [r["methods"].get(method, {}).get(pool) for r in results]  # type: ignore[attr-defined]  # of a results file
    if any(f is None for f in found):
        return None
    values = [client[key] for f in found for client in f["clients"].values()]
    return np.array([math.nan if value is None else value for value in values])


def _methods(results: list[dict[str, object]]) -> str:
    head = ["method", "seen accuracy", "seen loss", "unseen accuracy", "unseen loss"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- |"]
    for method, content in results[0]["methods"].items():  # type: ignore[attr-defined]  # of a results file
        cells = [content["label"]]
        for pool in ("seen", "unseen"):
            accuracy, loss = _values(results, method, pool), _values(results, method, pool, "loss")
            if accuracy is None or loss is None:
                cells += ["-", "-"]
            else:
                means = 100 * accuracy.reshape(len(results), -1).mean(1)
                cells += [f"{means.mean():.1f} ± {means.std():.1f}", f"{loss.mean():.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(results: list[dict[str, object]]) -> str:
    head = ["FedL2P minus", "pool", "accuracy, points", "95 % interval", "loss", "95 % interval"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- | --- |"]
    for method, content in results[0]["methods"].items():  # type: ignore[attr-defined]  # of a results file
        for pool in ("seen", "unseen") if method != "fedl2p" else ():
            own, other = _values(results, "fedl2p", pool), _values(results, method, pool)
            if own is not None and other is not None:
                cells = [content["label"], pool, *_interval(100 * (own - other), 2)]
                losses = [_values(results, name, pool, "loss") for name in ("fedl2p", method)]
                cells += _interval(losses[0] - losses[1], 3)  # type: ignore[operator]  # there, as the accuracies are
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(differences: np.ndarray, digits: int) -> list[str]:
    if not np.isfinite(differences).all():
        return ["not finite", ""]
    mean, low, high = paired_bootstrap(differences, seed=0)
    return [f"{mean:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}"]


if __name__ == "__main__":
    main()
