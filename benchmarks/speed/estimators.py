"""The hypergradient estimators, time and peak memory (Appendix C's comparison): ResNet-18 at 32x32, 40 + 10 images.

Run:  python -m benchmarks.speed.estimators
Time: 3 minutes on 2 cores.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.speed import reference
from benchmarks.speed.cases import Client
from benchmarks.speed.measure import Row, command, in_turns, peak_memory
from fedl2p.core.episode import Episode, make_episode
from fedl2p.core.finetune import FineTuned, finetune
from fedl2p.core.hypergradients import FOMAML, IFT, HypergradientEstimator, Unrolled
from fedl2p.core.hypergradients.base import last_step_gradient
from fedl2p.core.meta_nets import Hyperparameters


class Solved(NamedTuple):
    """A client after its inner loop."""

    client: Client
    episode: Episode
    tuned: FineTuned

    def estimate(self, estimator: HypergradientEstimator) -> object:
        """The hypergradient."""
        recipe = Hyperparameters(self.client.beta, self.client.eta)
        return estimator(
            self.client.model, self.episode, self.tuned, recipe, differentiation=self.client.differentiation
        )


def inner_loop(client: Client, epochs: int, history: int = 0) -> FineTuned:
    """Fine-tunes a client."""
    return finetune(
        client.model,
        client.state,
        client.train * epochs,
        client.beta,
        client.eta,
        history=history,
        differentiation=client.differentiation,
    )


def solve(client: Client, estimator: HypergradientEstimator, epochs: int) -> Solved:
    """Fine-tunes a client with the history that an estimator asks for."""
    batches = client.train * epochs
    episode = make_episode(client.model, client.statistics, batches, [client.val])
    return Solved(client, episode, inner_loop(client, epochs, estimator.history(len(batches))))


def ready(name: str, epochs: int = 1) -> Callable[[], object]:
    """A client after its inner loop, and the estimator to be called on it; for a process of its own."""
    client = Client()
    estimators: dict[str, HypergradientEstimator] = {
        "ift": IFT(form="paper"),
        "fomaml": FOMAML(),
        "unrolled": Unrolled(),
    }
    estimator = estimators[name]
    solved = solve(client, estimator, epochs)
    return lambda: solved.estimate(estimator)


def measure(quick: bool) -> list[Row]:
    """Ours against the reference's, and `unrolled` against its inner loop."""
    repeats, epochs = (2, 2) if quick else (5, 15)
    client = Client()
    solved = solve(client, IFT(), 1)
    gradient = list(last_step_gradient(client.model, solved.episode, solved.tuned, client.beta).values())
    leaf = client.beta.clone().requires_grad_()
    naive = reference.with_mixed_batch_norms(client.copy(), leaf)
    train, val = client.train[0], client.val
    memory = {}
    for name in ("ift", "fomaml", "unrolled"):
        before, after = peak_memory(ready, name)
        memory[name] = f"peak {after:.0f} MiB, {max(0, after - before):.0f} more than before"
    rows = []
    for form in ("paper", "corrected"):
        rows.append(
            in_turns(
                f"ift, {form} form, Q = 3",
                lambda form=form: solved.estimate(IFT(form=form)),  # type: ignore[misc]  # a lambda with a default
                lambda: reference.ift(naive, leaf, train, val, gradient, terms=3, psi=0.1),
                against="ift by double backward, reference",
                repeats=repeats,
                target=0.5,
                note=memory["ift"],
            )
        )
    rows += [
        in_turns(
            "fomaml",
            lambda: solved.estimate(FOMAML()),
            lambda: reference.fomaml(naive, leaf, val, gradient),
            against="FO-MAML, reference (given the last gradient)",
            repeats=repeats,
            note=memory["fomaml"],
        ),
        in_turns(
            "ift, paper form, Q = 3",
            lambda: solved.estimate(IFT(form="paper")),
            lambda: reference.hessian_free(naive, leaf, train, val, gradient),
            against="HF-MAML, reference",
            repeats=repeats,
        ),
    ]
    whole = solve(client, Unrolled(), epochs)
    rows.append(
        in_turns(
            f"unrolled through {len(whole.tuned.history)} steps",
            lambda: whole.estimate(Unrolled()),
            lambda: inner_loop(client, epochs),
            against="its inner loop",
            repeats=1 if quick else 3,
            target=5.0,
            note=memory["unrolled"],
        )
    )
    short, long = (peak_memory(_unrolled, epochs)[1] for epochs in (2, 8))
    steps = "a meta step by unrolled, 16 steps"
    note = f"{(long - short) / 12:.0f} MiB a step more; the parameters are 43 MiB"
    rows.append(Row(f"peak memory of {steps}", long, "4 steps", short, long / short, note=note, unit="MiB"))
    return rows


def _unrolled(epochs: int) -> Callable[[], object]:
    client = Client()

    def whole() -> object:
        with torch.no_grad():
            return solve(client, Unrolled(), epochs).estimate(Unrolled())

    return whole


if __name__ == "__main__":
    command(__doc__, measure)
