"""The Flower strategy of Algorithm 1: who takes part, and how their lambdas become one."""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedl2p.core.functional import Tensors
from fedl2p.errors import ConfigError, FederationError
from fedl2p.federation.client_app import find_nodes
from fedl2p.federation.messages import (
    ARRAYS,
    DESCRIBE,
    META_EVALUATE,
    META_TRAIN,
    METRICS,
    NUM_SAMPLES,
    PARTITION,
    WeightedMean,
    from_arrays,
    in_order,
    instruction,
    to_arrays,
)
from fedl2p.seeding import derive_seed

Decay = Literal["none", "cosine"]


@dataclass(frozen=True, eq=False)
class Participant:
    """A node that answered: its client, the client's N_i, and the statistics that the nets read."""

    node_id: int
    client_id: int
    num_samples: int
    bn_divergence: Tensor
    layer_moments: Tensor


class FedL2PStrategy(Strategy):
    """Samples seen clients, averages their lambdas by training samples, and validates on a fixed cohort.

    Draws follow from the seed, the round and the sorted client ids, and replies are summed in the order of client ids,
    so a run repeats bit for bit although Flower's nodes and replies come in any order.

    Attributes:
        participants: by client id, in order; filled by `discover`.
        failures: by client name, why its last message was of no use; emptied by each configure call.
        skipped_steps: of the last training round.
        net_inputs: the buffers of the nets, which say how their inputs are standardized; sent along with lambda, since
            clients may live in other processes. Where there are none, clients keep theirs.
    """

    def __init__(
        self,
        *,
        like: Tensors,
        names: dict[int, str],
        client_fraction: float = 0.1,
        validation_fraction: float = 1.0,
        min_reply_fraction: float = 0.5,
        rounds: int = 100,
        meta_lr_decay: Decay = "none",
        seed: int = 0,
    ) -> None:
        """Sets the strategy up.

        Args:
            like: lambda, for names, shapes and types.
            names: of the seen clients, by client id; nodes of other clients take no part.
            client_fraction: r, the share of the seen pool in a round, above 0 and at most 1.
            validation_fraction: the share of the seen pool in the fixed validation cohort, likewise.
            min_reply_fraction: of a round's clients, the share that must give a usable answer.
            rounds: T, over which the meta learning rates decay.
            meta_lr_decay: `cosine` lowers the meta learning rates to 0 over the rounds; `none` keeps them (the paper).
            seed: of the run.

        Raises:
            ConfigError: a value outside those.
        """
        for key, value in (
            ("client_fraction", client_fraction),
            ("validation_fraction", validation_fraction),
            ("min_reply_fraction", min_reply_fraction),
        ):
            if not 0 < value <= 1:
                raise ConfigError(f"federation.{key} is {value}; allowed is above 0 and at most 1.")
        if meta_lr_decay not in ("none", "cosine"):
            raise ConfigError(f"federation.meta_lr_decay is '{meta_lr_decay}'; allowed are 'none' and 'cosine'.")
        self.like = like
        self.net_inputs: Tensors = {}
        self.names = names
        self.client_fraction = client_fraction
        self.validation_fraction = validation_fraction
        self.min_reply_fraction = min_reply_fraction
        self.rounds = rounds
        self.meta_lr_decay = meta_lr_decay
        self.seed = seed
        self.participants: dict[int, Participant] = {}
        self.failures: dict[str, str] = {}
        self.skipped_steps = 0
        self._asked: list[Participant] = []

    def discover(self, grid: Grid) -> None:
        """Asks every node who it is; call it once before the rounds.

        Raises:
            FederationError: a seen client's node does not answer as it should.
        """
        nodes = find_nodes(grid)
        missing = [name for client_id, name in self.names.items() if client_id not in nodes]
        if missing:
            raise FederationError(f"{len(missing)} seen clients have no node, among them '{missing[0]}'.")
        messages = [instruction(DESCRIBE, nodes[client_id], config={"server-round": 0}) for client_id in self.names]
        found: dict[int, Participant] = {}
        for answer in grid.send_and_receive(messages):
            if answer.has_error():
                raise FederationError(f"A client could not describe its data: {answer.error.reason}")
            metrics, arrays = answer.content.metric_records[METRICS], answer.content.array_records[ARRAYS]
            client_id = _number(metrics, PARTITION)
            found[int(client_id)] = Participant(
                node_id=answer.metadata.src_node_id,
                client_id=int(client_id),
                num_samples=int(_number(metrics, NUM_SAMPLES)),
                bn_divergence=torch.from_numpy(arrays["bn_divergence"].numpy().copy()),
                layer_moments=torch.from_numpy(arrays["layer_moments"].numpy().copy()),
            )
        self.participants = {client_id: found[client_id] for client_id in sorted(self.names)}

    def sample(self, fraction: float, *key: int | str) -> list[Participant]:
        """A share of the participants without replacement, at least one, in the order of client ids."""
        ids = list(self.participants)
        count = max(1, round(fraction * len(ids)))
        rng = np.random.default_rng(derive_seed(self.seed, *key))
        return [self.participants[ids[i]] for i in sorted(rng.choice(len(ids), count, replace=False))]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Lines 3 to 5 of Algorithm 1: lambda to a sample of the seen pool."""
        chosen = self.sample(self.client_fraction, "sample", server_round)
        scale = decayed(self.meta_lr_decay, server_round, self.rounds)
        return self._instruct(META_TRAIN, chosen, server_round, arrays, {"meta-lr-scale": scale})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Line 14 of Algorithm 1: the mean of the clients' lambdas, weighted by their training samples.

        Raises:
            FederationError: too few usable replies.
        """
        mean = WeightedMean()
        clients: list[int] = []
        losses: list[tuple[int, float]] = []
        self.skipped_steps = 0
        for participant, message in self._in_order(replies):
            tensors = self._usable(participant, message)
            if tensors is not None:
                metrics = message.content.metric_records[METRICS]
                mean.add(participant.num_samples, tensors)
                clients.append(participant.client_id)
                losses.append((participant.num_samples, _number(metrics, "meta-loss")))
                self.skipped_steps += int(_number(metrics, "skipped-steps"))
        self._require_enough(server_round, len(clients))
        finite = [(n, loss) for n, loss in losses if math.isfinite(loss)]
        meta_loss = sum(n * loss for n, loss in finite) / sum(n for n, _ in finite) if finite else math.nan
        return to_arrays(mean.result()), MetricRecord({"meta-loss": meta_loss, "clients": clients})

    def _usable(self, participant: Participant, message: Message) -> Tensors | None:
        """A client's lambda; None, and a failure, where it is not what was asked for or not finite."""
        name = self.names[participant.client_id]
        try:
            tensors = from_arrays(message.content.array_records[ARRAYS], self.like)
        except FederationError as error:
            self.failures[name] = str(error)
            return None
        bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            self.failures[name] = f"the update of '{bad[0]}' is not finite"
        return None if bad else tensors

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The aggregated lambda to the fixed validation cohort."""
        return self._instruct(
            META_EVALUATE, self.sample(self.validation_fraction, "validation"), server_round, arrays, {}
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The cohort's mean validation loss, weighted by training samples; infinite if a client's is not finite.

        Raises:
            FederationError: too few usable replies.
        """
        good = [
            (p.num_samples, _number(message.content.metric_records[METRICS], "val-loss"))
            for p, message in self._in_order(replies)
        ]
        self._require_enough(server_round, len(good))
        loss = sum(n * value for n, value in good) / sum(n for n, _ in good)
        return MetricRecord({"val-loss": loss if math.isfinite(loss) else math.inf})

    def summary(self) -> None:
        """Nothing is printed: the callbacks show a run."""

    def _instruct(
        self,
        kind: str,
        chosen: Collection[Participant],
        server_round: int,
        arrays: ArrayRecord,
        config: dict[str, float],
    ) -> list[Message]:
        self._asked, self.failures = list(chosen), {}
        net_inputs = to_arrays(self.net_inputs) if self.net_inputs else None
        config = {"server-round": server_round, **config}
        return [instruction(kind, p.node_id, arrays=arrays, net_inputs=net_inputs, config=dict(config)) for p in chosen]

    def _in_order(self, replies: Iterable[Message]) -> Iterator[tuple[Participant, Message]]:
        """Replies without an error, in the order of client ids; errors and silence become failures."""
        asked = {participant.node_id: participant for participant in self._asked}
        for node_id, message in in_order(asked, replies):
            participant = asked[node_id]
            name = self.names[participant.client_id]
            if message is None:
                self.failures[name] = "no reply"
            elif message.has_error():
                self.failures[name] = message.error.reason or "an error without a reason"
            else:
                yield participant, message

    def _require_enough(self, server_round: int, good: int) -> None:
        needed = max(1, math.ceil(self.min_reply_fraction * len(self._asked)))
        if good < needed:
            name, reason = next(iter(self.failures.items()), ("?", "no reply"))
            raise FederationError(
                f"Round {server_round}: {good} of {len(self._asked)} clients gave a usable answer, {needed} are needed "
                f"(federation.min_reply_fraction {self.min_reply_fraction}); '{name}': {reason}."
            )


def decayed(decay: str, number: int, total: int) -> float:
    """What the meta learning rates are multiplied by in step `number` of `total`, counted from 1."""
    return 0.5 * (1 + math.cos(math.pi * (number - 1) / max(total, 1))) if decay == "cosine" else 1.0


def _number(metrics: MetricRecord, key: str) -> float:
    value = metrics[key]
    assert isinstance(value, int | float)
    return value
