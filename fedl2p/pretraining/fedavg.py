"""FedAvg (McMahan et al. 2017): theta_g is the mean of models that clients trained for a while on their own data.

Flower's own FedAvg strategy averages; this file adds the client's side, and a sampling and summing order that repeat.
"""

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedl2p.errors import ConfigError, FederationError
from fedl2p.federation.messages import (
    ARRAYS,
    CONFIG,
    NUM_SAMPLES,
    PRETRAIN,
    from_arrays,
    instruction,
    reply,
    to_arrays,
)
from fedl2p.finetune import LossFunction, Tensors
from fedl2p.seeding import derive_seed

if TYPE_CHECKING:
    from datamodules.federated import FederatedDataModule

PARTITION = "partition-id"


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
        self.model = copy.deepcopy(model)
        self.epochs = epochs
        self.lr = lr
        self.momentum = momentum
        self.loss_fn = loss_fn
        self.seed = seed

    def train(self, tensors: Tensors, client_id: int, round_number: int) -> tuple[Tensors, int]:
        """Trains from `tensors` (a state dict) on a client's data; returns the new ones and the number of samples."""
        seed = derive_seed(self.seed, "pretrain", round_number, client_id)
        torch.manual_seed(seed)
        self.model.load_state_dict(tensors)
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=self.momentum)
        loader = self.data.client(client_id, seed=seed).train_dataloader()
        samples = 0
        for _ in range(self.epochs):
            samples = 0
            for inputs, targets in loader:
                optimizer.zero_grad()
                self.loss_fn(self.model(inputs), targets).backward()
                optimizer.step()
                samples += len(targets)
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}, samples


def make_pretrain_app(training: LocalTraining) -> ClientApp:
    """The ClientApp that answers `train.pretrain`."""
    app = ClientApp()

    @app.train("pretrain")
    def train(message: Message, context: Context) -> Message:
        record = message.content
        tensors = from_arrays(record.array_records[ARRAYS], training.model.state_dict())
        number = record.config_records[CONFIG]["server-round"]
        assert isinstance(number, int)
        new, samples = training.train(tensors, int(context.node_config[PARTITION]), number)
        return reply(message, arrays=new, metrics={NUM_SAMPLES: samples})

    return app


class PretrainStrategy(FedAvg):
    """Flower's FedAvg with reproducible sampling: all nodes take part, in order; a failure stops the run."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The global model to every node."""
        content = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        return [
            instruction(PRETRAIN, node_id, arrays=content, config={"server-round": server_round})
            for node_id in sorted(grid.get_node_ids())
        ]


def pretrain(
    grid: Grid,
    model: nn.Module,
    *,
    rounds: int,
    on_round: Callable[[int], None] = lambda number: None,
) -> nn.Module:
    """Trains `model` by FedAvg over all nodes of `grid`.

    Args:
        grid: whose nodes answer `train.pretrain`.
        model: where to start; not changed.
        rounds: how many, at least 1.
        on_round: called with the number of each round that is done.

    Returns:
        A trained copy, in evaluation mode.

    Raises:
        FederationError: a client failed, or the model is not finite any more.
    """
    strategy = PretrainStrategy(weighted_by_key=NUM_SAMPLES, fraction_evaluate=0.0)
    model = copy.deepcopy(model)
    like = model.state_dict()
    for number in range(1, rounds + 1):
        messages = strategy.configure_train(number, to_arrays(model.state_dict()), ConfigRecord(), grid)
        replies = sorted(grid.send_and_receive(messages), key=lambda m: m.metadata.src_node_id)
        failed = [message.error.reason for message in replies if message.has_error()]
        if failed:
            raise FederationError(f"Pretraining, round {number}: a client failed: {failed[0]}")
        arrays, _ = strategy.aggregate_train(number, replies)
        assert arrays is not None
        # Flower averages integers (batch counts) to fractions, which would be cut off.
        whole = {name for name, t in like.items() if not t.is_floating_point()}
        mean = {name: array.numpy() for name, array in arrays.items()}
        mean |= {name: np.asarray(mean[name].round()) for name in whole}
        tensors = from_arrays(ArrayRecord({name: Array(value) for name, value in mean.items()}), like)
        bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if bad:
            raise FederationError(
                f"Pretraining, round {number}: '{bad[0]}' is not finite; choose a lower pretraining.lr."
            )
        model.load_state_dict(tensors)
        on_round(number)
    return model.eval()
