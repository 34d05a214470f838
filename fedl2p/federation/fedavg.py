"""FedAvg (McMahan et al. 2017) over Flower's messages: theta_g is the mean of models that clients trained for a while.

Not by Flower's FedAvg strategy, which holds all replies at once: a hundred ResNet-18s are 4.5 GB.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import nn

from fedl2p.core.functional import Tensors
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
        seed: of the draws.
        on_round: called with the number of each round that is done.

    Returns:
        A trained copy, in evaluation mode, on the CPU.

    Raises:
        FederationError: a client failed, or the model is not finite any more.
    """
    model = copy.deepcopy(model).cpu()
    nodes = [node_id for client_id, node_id in find_nodes(grid).items() if client_id in client_ids]
    count = max(1, round(client_fraction * len(nodes)))
    for number in range(1, rounds + 1):
        rng = np.random.default_rng(derive_seed(seed, "pretrain-sample", number))
        chosen = [nodes[i] for i in sorted(rng.choice(len(nodes), count, replace=False))]
        config = {"server-round": number, "lr-scale": 0.1 ** sum(number >= drop for drop in lr_drops)}
        arrays = to_arrays(model.state_dict())
        messages = [instruction(PRETRAIN, node_id, arrays=arrays, config=config) for node_id in chosen]
        model.load_state_dict(_mean(chosen, grid.send_and_receive(messages), model.state_dict(), number))
        on_round(number)
    return model.eval()


def _mean(node_ids: Sequence[int], replies: Iterable[Message], template: Tensors, number: int) -> Tensors:
    """The clients' models, averaged by their samples in the order of the nodes."""
    mean = WeightedMean()
    for _, answer in answers(node_ids, replies, partial(read_model, template=template)):
        if isinstance(answer, Refusal):
            raise FederationError(f"Pretraining, round {number}: a client failed: {answer.reason}")
        mean.add(*answer)
    tensors = mean.result()
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise FederationError(f"Pretraining, round {number}: '{bad[0]}' is not finite; choose a lower pretraining.lr.")
    return tensors
