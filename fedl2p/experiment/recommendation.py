"""What a run recommends for new clients: what has the lowest loss on validation data of the seen clients.

A refined recipe has looked at the client's validation data, so its loss there says nothing. Each seen client's
validation data are halved instead: refined on one half, measured on the other, and the other way round. Test data are
not looked at.

The choice is not fair to all: the nets have learned from these very samples, so FedL2P looks better here than on
clients that it does not know, and the mean recipe does to a lesser degree; and half the data refine worse than all.
Only seen clients that were kept out of the rounds could judge without that.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.utils import _pytree as pytree

from fedl2p.core.episode import Episode
from fedl2p.core.functional import concatenate
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.experiment.context import RunContext
from fedl2p.experiment.evaluation import fine_tuning_like, shared_recipe
from fedl2p.experiment.methods import FINE_TUNING, TunedRate
from fedl2p.experiment.recipes import hand_made
from fedl2p.experiment.stages import weighted_loss
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.federation.state import MetaState

FEWEST = 4
"""Validation samples of a client, below which half of them are too few to measure on."""
CANDIDATES = 4


def recommendation(
    context: RunContext, runtime: ClientRuntime, rates: Mapping[str, TunedRate], state: MetaState
) -> dict[str, Any] | None:
    """Stage 6: which of FedL2P, the mean recipe, that one refined, and the best fine-tuning to give to a new client.

    Args:
        context: of the run.
        runtime: the clients.
        rates: of the hand-made recipes.
        state: of the rounds, with the best lambda.

    Returns:
        `method`, a key of the methods, and `val_losses`, the held-out loss of each candidate; None where nothing is
        refined, or a seen client has fewer than `FEWEST` validation samples.
    """
    seen, settings = context.data.pool("seen"), context.config.refinement
    if not settings.steps or min(context.data.client_sizes(i)[1] for i in seen) < FEWEST:
        return None
    mean, tuned = shared_recipe(context, runtime, state.best_lambda), fine_tuning_like(context, runtime, rates)
    fixed = hand_made(runtime, FINE_TUNING[tuned])(rates[tuned].rate)
    candidates: dict[str, list[Hyperparameters]] = {
        tuned: [fixed(i) for i in seen],
        "mean_recipe": [mean] * len(seen),
        "fedl2p": [runtime.recipe(state.best_lambda, i) for i in seen],
    }
    losses = dict.fromkeys([*candidates, "fedl2p_refined"], 0.0)
    with context.bar(f"Choosing by held-out data ({2 * (settings.steps + 1)} hypergradients a client)", 2) as bar:
        for number in range(2):
            own, other = partial(half, number=number), partial(half, number=1 - number)
            refined = runtime.refine(candidates["mean_recipe"], seen, settings, view=own)
            now = candidates | {"fedl2p_refined": [one.hyperparameters for one in refined]}
            for name, recipes in now.items():
                losses[name] += weighted_loss(runtime, runtime.evaluate(recipes, seen, view=other), seen) / 2
            bar.advance()
    return {"method": min(losses, key=lambda name: losses[name]), "val_losses": losses}


def half(episode: Episode, number: int) -> Episode:
    """A view of one half (0 or 1) of a client's validation data, in which every second sample is."""
    whole = concatenate(episode.val_batches)
    return episode._replace(val_batches=[pytree.tree_map(lambda tensor: tensor[number::2].contiguous(), whole)])
