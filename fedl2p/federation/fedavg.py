"""FedAvg (McMahan et al. 2017) over Flower's messages: theta_g is the mean of models that clients trained for a while.

Not by Flower's FedAvg strategy, which holds all replies at once: a hundred ResNet-18s are 4.5 GB.
"""

import copy
import logging
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import nn

from fedl2p.errors import FederationError
from fedl2p.federation.aggregation import WeightedMean
from fedl2p.federation.client_app import add_identity_handler
from fedl2p.federation.messages import (
    ARRAYS,
    CONFIG,
    NUM_SAMPLES,
    PARTITION,
    PRETRAIN,
    from_arrays,
    instruction,
    reply,
    to_arrays,
)
from fedl2p.federation.participants import find_nodes
from fedl2p.federation.replies import Refusal, answers, read_model
from fedl2p.pretraining.fedavg import LocalTraining
from fedl2p.seeding import derive_seed

logger = logging.getLogger(__name__)


def make_pretrain_app(training: LocalTraining) -> ClientApp:
    """The ClientApp that answers `train.pretrain`."""
    app = ClientApp()
    add_identity_handler(app)
    add_pretrain_handler(app, lambda: training)
    return app


def add_pretrain_handler(app: ClientApp, training: Callable[[], LocalTraining]) -> None:
    """Lets `app` answer `train.pretrain`; `training` is called with each message."""

    @app.train("pretrain")
    def train(message: Message, context: Context) -> Message:
        record = message.content
        own = training()
        tensors = from_arrays(record.array_records[ARRAYS], own.model.state_dict())
        config = record.config_records[CONFIG]
        number, scale = config["server-round"], config["lr-scale"]
        assert isinstance(number, int) and isinstance(scale, float)
        new, samples = own.train(tensors, int(context.node_config[PARTITION]), number, lr_scale=scale)
        return reply(message, arrays=new, metrics={NUM_SAMPLES: samples})


def pretrain(
    grid: Grid,
    model: nn.Module,
    *,
    client_ids: Collection[int],
    rounds: int,
    client_fraction: float = 1.0,
    lr_drops: Sequence[int] = (),
    min_reply_fraction: float = 0.5,
    seed: int = 0,
    on_round: Callable[[int], None] = lambda number: None,
) -> nn.Module:
    """Trains `model` by FedAvg over clients, whose replies are averaged in a fixed order.

    Args:
        grid: whose nodes answer `train.pretrain`.
        model: where to start; not changed.
        client_ids: who takes part.
        rounds: how many, at least 1.
        client_fraction: share of them in a round, above 0 and at most 1; drawn without replacement.
        lr_drops: rounds from which on the learning rate is a tenth of what it was before.
        min_reply_fraction: of the clients that are asked, the share that must give a usable answer; the others are
            left out, and the log names them.
        seed: of the draws.
        on_round: called with the number of each round that is done.

    Returns:
        A trained copy, in evaluation mode, on the CPU.

    Raises:
        FederationError: too few clients gave a usable, finite model.
    """
    model = copy.deepcopy(model).cpu()
    nodes, reasons = find_nodes(grid, client_ids)
    _leave_out(reasons, len(client_ids), min_reply_fraction, "Pretraining")
    clients = {node_id: client_id for client_id, node_id in nodes.items()}
    count = max(1, round(client_fraction * len(clients)))
    for number in range(1, rounds + 1):
        rng = np.random.default_rng(derive_seed(seed, "pretrain-sample", number))
        chosen = [list(clients)[i] for i in sorted(rng.choice(len(clients), count, replace=False))]
        config = {"server-round": number, "lr-scale": 0.1 ** sum(number >= drop for drop in lr_drops)}
        arrays = to_arrays(model.state_dict())
        messages = [instruction(PRETRAIN, node_id, arrays=arrays, config=config) for node_id in chosen]
        mean, failures = WeightedMean(), {}
        read = partial(read_model, template=model.state_dict())
        for node_id, answer in answers(chosen, grid.send_and_receive(messages), read):
            if isinstance(answer, Refusal):
                failures[clients[node_id]] = answer.reason
            else:
                mean.add(*answer)
        _leave_out(failures, count, min_reply_fraction, f"Pretraining, round {number}")
        model.load_state_dict(mean.result())
        on_round(number)
    return model.eval()


def _leave_out(failures: dict[int, str], asked: int, min_reply_fraction: float, stage: str) -> None:
    """Names the clients that are left out, or stops where they are too many."""
    needed = max(1, math.ceil(min_reply_fraction * asked))
    if asked - len(failures) < needed:
        client_id, reason = next(iter(failures.items()))
        raise FederationError(
            f"{stage}: a client failed: {reason} (client {client_id}; {asked - len(failures)} of {asked} gave a usable "
            f"answer, {needed} are needed)"
        )
    for client_id, reason in failures.items():
        logger.warning("%s: client %d is left out: %s", stage, client_id, reason)
