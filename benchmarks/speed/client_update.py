"""One client's whole meta update by `ift`: ResNet-18 at 32x32, 40 + 10 images, e = 15, K = 3.

Run:  python -m benchmarks.speed.client_update --full
Time: 6 minutes on 2 cores; without --full (e = 5, K = 1) under one.
"""

import torch

from benchmarks.speed import reference
from benchmarks.speed.cases import Client
from benchmarks.speed.measure import Row, command, in_turns
from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.cohort import ClientTask, CohortRunner
from fedl2p.core.hypergradients import IFT
from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.statistics import collect_statistics

META_LR = {"bn_net": 1e-3, "lr_net": 1e-3, "base_lr": 1e-4}
AGAINST = "reference loop"


def measure(quick: bool) -> list[Row]:
    """Float32 and bf16-mixed; statistics are collected in the measured time, as for a client's first round."""
    epochs, iterations, repeats = (5, 1, 1) if quick else (15, 3, 1)
    client = Client()
    nets = MetaNets(convert_batchnorm(client.plain), base_lr=0.01)
    runner = CohortRunner(client.model)
    lambda_ = {name: p.detach().clone() for name, p in nets.named_parameters()}

    def ours() -> None:
        statistics = collect_statistics(client.model.module, [x for x, _ in client.train])
        task = ClientTask(statistics, client.train * epochs, [client.val], [])
        runner.meta_update(nets, IFT(form="paper"), [lambda_], [[task]] * iterations, meta_lr=META_LR)

    def half() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours()

    def theirs() -> None:
        reference.meta_update(
            client.plain, client.beta, client.eta, client.train, client.val, epochs=epochs, iterations=iterations
        )

    size = f"e = {epochs}, K = {iterations}"
    return [
        in_turns(f"meta update by ift, {size}", ours, theirs, against=AGAINST, repeats=repeats, target=0.6),
        in_turns(f"the same, bf16-mixed, {size}", half, theirs, against=AGAINST, repeats=repeats, target=0.4),
    ]


if __name__ == "__main__":
    command(__doc__, measure)
