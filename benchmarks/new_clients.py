"""What policies of finished runs give to clients: plain, served models, measured with running statistics.

Run:  fedl2p run digits seed=0 output_dir=runs/digits0 baselines.l2p=false baselines.shuffled=false federation.rounds=30
      python benchmarks/new_clients.py runs/digits0
Time: 6 minutes a run on one busy core, after the run itself.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from fedl2p.core.refinement import RefinementSettings
from fedl2p.datamodules.base.client import ClientDataModule
from fedl2p.experiment.build import GLOBAL_MODEL, build_data, build_model
from fedl2p.experiment.config import from_yaml
from fedl2p.models import load_weights
from fedl2p.policy import Policy

Scores = dict[str, list[tuple[float, ...]]]
"""By way to personalize, for each client: validation accuracy and loss, test accuracy and loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scores: dict[str, Scores] = {pool: defaultdict(list) for pool in ("seen", "unseen")}
    for run in options.runs:
        config = from_yaml((run / "config.yaml").read_text())
        data, model = build_data(config), build_model(config).eval()
        load_weights(model, run / GLOBAL_MODEL)
        for pool, own in scores.items():
            for client_id in data.pool(pool):
                measure_client(model, Policy.load(run), data.client(client_id, seed=client_id), own)
    for pool, own in scores.items():
        print(f"| {pool} | val accuracy | val loss | test accuracy | test loss |\n| --- | --- | --- | --- | --- |")
        for name, rows in own.items():
            mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            print(f"| {name} | {100 * mean[0]:.1f} | {mean[1]:.3f} | {100 * mean[2]:.1f} | {mean[3]:.3f} |")


def measure_client(model: nn.Module, policy: Policy, client: ClientDataModule, scores: Scores) -> None:
    def personalize(**options: object) -> nn.Module:
        return policy.personalize(model, client.train_dataloader(), **options)

    mean, val = policy.mean_recipe, client.val_dataloader()
    ways = {
        "global model": model,
        "nets": personalize(),
        "nets, not recalibrated": personalize(recalibrate=False),
        "nets, refined on validation data": personalize(refine=RefinementSettings(), val_loader=val),
        "nets, refined on a quarter of the training data": personalize(refine=RefinementSettings()),
        "mean recipe": personalize(hyperparameters=mean),
        "mean recipe, not recalibrated": personalize(hyperparameters=mean, recalibrate=False),
    }
    for name, own in ways.items():
        scores[name].append((*score(own, val), *score(own, client.test_dataloader())))


@torch.no_grad()
def score(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    outputs, labels = (torch.cat(part) for part in zip(*((model(x), y) for x, y in loader), strict=True))
    return float((outputs.argmax(1) == labels).float().mean()), float(nn.functional.cross_entropy(outputs, labels))


if __name__ == "__main__":
    main()
