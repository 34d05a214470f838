"""One client's whole meta update by `ift`: ResNet-18 at 32x32, 40 + 10 images, e = 15, K = 3.

Run:  python -m benchmarks.speed.client_update --full
Time: 6 minutes on 2 cores; without --full (e = 5, K = 1) under one.
"""

import torch

from benchmarks.speed import reference
from benchmarks.speed.cases import Client
from benchmarks.speed.measure import Row, command, in_turns
from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.episode import make_episode
from fedl2p.core.hypergradients import IFT
from fedl2p.core.learner import Learner
from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.statistics import collect_statistics

AGAINST = "reference loop"


def measure(quick: bool) -> list[Row]:
    """Float32 and bf16-mixed; statistics are collected in the measured time, as for a client's first round."""
    epochs, iterations, repeats = (5, 1, 1) if quick else (15, 3, 1)
    client = Client()
    nets = MetaNets(convert_batchnorm(client.plain), base_lr=0.01)
    learner = Learner(client.model, nets, estimator=IFT(form="paper"))
    learner.fit_to(client.train[0][0])
    lambda_ = learner.lambda_()

    def ours() -> None:
        statistics = collect_statistics(client.model.module, [x for x, _ in client.train])
        episode = make_episode(client.model, statistics, client.train * epochs, [client.val])
        learner.meta_update([lambda_], [[episode]] * iterations)

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
