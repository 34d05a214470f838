"""configs/digits.yaml on several seeds: all methods, and FedL2P's differences with intervals over all clients.

Run:  python benchmarks/digits.py --seeds 0 1 2 --output runs/digits-seeds
Time: about 3 minutes a seed on 2 cores.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from fedl2p.analysis import paired_bootstrap
from fedl2p.config import load_config
from fedl2p.main_job import run_and_report


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
        run_and_report(load_config([*arguments, *options.overrides]))
    return dict(json.loads(path.read_text()))


def _values(results: list[dict[str, object]], method: str, pool: str, key: str = "accuracy") -> np.ndarray | None:
    """Of every client in every seed."""
    found = [r["methods"].get(method, {}).get(pool) for r in results]  # type: ignore[attr-defined]
    if any(f is None for f in found):
        return None
    return np.array([client[key] for f in found for client in f["clients"].values()])


def _methods(results: list[dict[str, object]]) -> str:
    head = ["method", "seen accuracy", "seen loss", "unseen accuracy", "unseen loss"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- |"]
    for method, content in results[0]["methods"].items():  # type: ignore[attr-defined]
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
    lines = ["| FedL2P minus | pool | accuracy, points | 95 % interval |", "| --- | --- | --- | --- |"]
    for method, content in results[0]["methods"].items():  # type: ignore[attr-defined]
        for pool in ("seen", "unseen") if method != "fedl2p" else ():
            own, other = _values(results, "fedl2p", pool), _values(results, method, pool)
            if own is not None and other is not None:
                mean, low, high = paired_bootstrap(100 * (own - other), seed=0)
                lines.append(f"| {content['label']} | {pool} | {mean:+.2f} | {low:+.2f} to {high:+.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
