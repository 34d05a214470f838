"""FedAvg (McMahan et al. 2017): theta_g is the mean of models that clients trained for a while on their own data.

Over Flower's messages, but not its FedAvg strategy, which holds all replies at once: a hundred ResNet-18s are 4.5 GB.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import nn

from fedl2p.core.functional import LossFunction, Tensors
from fedl2p.errors import ConfigError, FederationError
from fedl2p.federation.client_app import add_identity_handler, find_nodes
from fedl2p.federation.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    NUM_SAMPLES,
    PARTITION,
    PRETRAIN,
    WeightedMean,
    from_arrays,
    in_order,
    instruction,
    reply,
    to_arrays,
)
from fedl2p.seeding import derive_seed

if TYPE_CHECKING:
    from fedl2p.datamodules.base.federated import FederatedDataModule


class LocalTraining:
    """A client's part of FedAvg: SGD with momentum over its training data."""

    def __init__(
        self,
        data: "FederatedDataModule",
        model: nn.Module,
        *,
        epochs: int = 1,
        lr: float = 0.1,
        momentum: float = 0.9,
        loss_fn: LossFunction = nn.functional.cross_entropy,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        """Sets the training up.

        Args:
            data: the clients' data.
            model: the structure; its tensors are not changed.
            epochs: passes over the client's data in a round, at least 1.
            lr: positive.
            momentum: in [0, 1), starting anew each round.
            loss_fn: (outputs, targets) -> mean loss.
            device: where the model is trained.
            seed: of the run.

        Raises:
            ConfigError: a value outside those.
        """
        if epochs < 1 or lr <= 0 or not 0 <= momentum < 1:
            raise ConfigError(
                f"pretraining.epochs is {epochs}, lr {lr} and momentum {momentum}; allowed are at least 1, above 0, "
                "and from 0 to below 1."
            )
        self.data = data
        self.device = torch.device(device)
        self.model = copy.deepcopy(model).to(self.device)
        self.epochs = epochs
        self.lr = lr
        self.momentum = momentum
        self.loss_fn = loss_fn
        self.seed = seed

    def train(
        self, tensors: Tensors, client_id: int, round_number: int, *, lr_scale: float = 1.0
    ) -> tuple[Tensors, int]:
        """Trains from `tensors` (a state dict) on a client's data; returns the new ones and the number of samples."""
        seed = derive_seed(self.seed, "pretrain", round_number, client_id)
        torch.manual_seed(seed)
        self.model.load_state_dict(tensors)
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr * lr_scale, momentum=self.momentum)
        loader = self.data.client(client_id, seed=seed).train_dataloader()
        samples = 0
        for _ in range(self.epochs):
            samples = 0
            for inputs, targets in loader:
                optimizer.zero_grad()
                self.loss_fn(self.model(inputs.to(self.device)), targets.to(self.device)).backward()
                optimizer.step()
                samples += len(targets)
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}, samples


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
        replies = in_order(chosen, grid.send_and_receive(messages))
        model.load_state_dict(_mean(replies, model.state_dict(), number))
        on_round(number)
    return model.eval()


def _mean(replies: Iterable[tuple[int, Message | None]], like: Tensors, number: int) -> Tensors:
    """The clients' models, averaged by their samples in the order in which they come."""
    mean = WeightedMean()
    for _, message in replies:
        if message is None or message.has_error():
            reason = "no reply" if message is None else message.error.reason
            raise FederationError(f"Pretraining, round {number}: a client failed: {reason}")
        samples = message.content.metric_records[METRICS][NUM_SAMPLES]
        assert isinstance(samples, int)
        mean.add(samples, from_arrays(message.content.array_records[ARRAYS], like))
    tensors = mean.result()
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise FederationError(f"Pretraining, round {number}: '{bad[0]}' is not finite; choose a lower pretraining.lr.")
    return tensors
