"""The estimators side by side on the digits: validation loss by round, and the accuracy that it leads to.

Run:  python benchmarks/hypergradients.py --seeds 100 101 102 --output runs/hypergradients
Time: about 2 minutes an estimator and seed on 1 core.

Everything but the estimator (and, where a variant says so, the paper's settings) is as in configs/digits.yaml.
Selection uses validation data; the accuracies are of test data.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from fedl2p.experiment.config import load_config, to_yaml
from fedl2p.experiment.context import prepare
from fedl2p.experiment.run import run_stages

PAPER_NETS = [
    "meta_nets.initialization=paper",
    "meta_nets.standardize=false",
    "meta_nets.log_divergence=false",
    "meta_nets.sample_count=false",
]
# What the authors run: raw statistics, running statistics from 0 and 1, a small base rate, small meta rates, K = 3.
PAPER_ALL = [
    *PAPER_NETS,
    "client.running_start=zero_one",
    "client.evaluation_statistics=running",
    "client.meta_iterations=3",
    "client.meta_lr={bn_net: 0.001, lr_net: 0.001, base_lr: 0.0001}",
    "meta_nets.base_lr=0.01",
    "federation.meta_lr_decay=none",
]
VARIANTS: dict[str, list[str]] = {
    "unrolled": ["hypergradient.name=unrolled"],
    "unrolled, last 2 steps": ["hypergradient.name=unrolled", "hypergradient.init_args={steps: 2}"],
    "fomaml": ["hypergradient.name=fomaml"],
    "ift, corrected": ["hypergradient.name=ift", "hypergradient.init_args={form: corrected}"],
    "ift, paper": ["hypergradient.name=ift", "hypergradient.init_args={form: paper}"],
    "ift, paper, with all of the paper's settings": [
        "hypergradient.name=ift",
        "hypergradient.init_args={form: paper}",
        *PAPER_ALL,
    ],
    "unrolled, the paper's nets (raw inputs, small weights)": ["hypergradient.name=unrolled", *PAPER_NETS],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("runs/hypergradients"))
    parser.add_argument("overrides", nargs="*", help="key=value pairs for every run")
    options = parser.parse_intermixed_args()
    rows = []
    for variant in options.variants:
        runs = [_run(options, variant, seed) for seed in options.seeds]
        rows.append(_row(variant, runs))
        print(rows[-1], flush=True)
    table = "\n".join([HEAD, *rows])
    (options.output / "table.md").write_text(table + "\n")
    print(table)


def _run(options: argparse.Namespace, variant: str, seed: int) -> dict[str, object]:
    folder = options.output / f"{variant.replace(' ', '_').replace(',', '')}-{seed}"
    path = folder / "summary.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    base = [options.config, f"seed={seed}", f"output_dir={folder}", "baselines.l2p=false", "wandb.enabled=false"]
    context = prepare(load_config([*base, *VARIANTS[variant], *options.overrides]))
    with context.folder.opened(to_yaml(context.config), resume=False):
        outcome = run_stages(context)
    losses = [record.val_loss for record in outcome.state.history]
    summary: dict[str, object] = {
        "losses": [loss if math.isfinite(loss) else None for loss in losses],
        "best_round": outcome.state.best_round,
        "skipped": sum(record.skipped_steps for record in outcome.state.history),
    }
    for name in ("fedl2p", "fedl2p_shuffled"):
        for pool, clients in outcome.methods[name].pools.items():
            summary[f"{name}/{pool}"] = float(np.mean([row["accuracy"] for row in clients.values()]))
    path.write_text(json.dumps(summary, indent=2))
    return summary


HEAD = (
    "| estimator | val loss, round 0 | a third | two thirds | last | best (round) | seen | unseen | seen, shuffled |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def _row(variant: str, runs: list[dict[str, object]]) -> str:
    losses = np.array([[math.inf if v is None else v for v in run["losses"]] for run in runs])  # type: ignore[attr-defined]  # of a results file
    rounds = losses.shape[1] - 1
    points = [losses[:, round(rounds * share)].mean() for share in (0, 1 / 3, 2 / 3, 1)]
    best = "/".join(str(run["best_round"]) for run in runs)

    def accuracy(key: str) -> str:
        values = 100 * np.array([run[key] for run in runs])
        return f"{values.mean():.1f} ± {values.std():.1f}"

    cells = [
        variant,
        *(f"{p:.3f}" for p in points),
        f"{losses.min(1).mean():.3f} ({best})",
        accuracy("fedl2p/seen"),
        accuracy("fedl2p/unseen"),
        accuracy("fedl2p_shuffled/seen"),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
