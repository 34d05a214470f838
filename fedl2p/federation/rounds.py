"""Algorithm 1 of FedL2P, the server's side (Lee et al. 2023, https://arxiv.org/abs/2310.02420).

    federation = set_up(grid, meta_nets, names, settings)
    state = run_rounds(grid, federation, new_state(federation))

`Federation` is what does not change, `MetaState` what is learned. Every function returns what it found out; none keeps
anything. Draws follow from the seed, the round and the client ids, and replies are summed in the order of client ids,
so a run repeats bit for bit although nodes and replies come in any order.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedl2p.core.functional import Tensors
from fedl2p.core.meta_nets import MetaNets
from fedl2p.errors import ConfigError, FederationError
from fedl2p.federation.aggregation import WeightedMean
from fedl2p.federation.messages import META_EVALUATE, META_TRAIN, instruction, to_arrays
from fedl2p.federation.participants import Participant, find_participants, standardize_inputs
from fedl2p.federation.replies import Refusal, answers, read_loss, read_update, weighted
from fedl2p.federation.state import MetaState, RoundCallback, RoundRecord
from fedl2p.seeding import derive_seed

Decay = Literal["none", "cosine"]
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """How the rounds go.

    Attributes:
        rounds: T, the number of the last round; 0 only measures the initial lambda.
        patience: stop after so many rounds without a better lambda; at least 1.
        client_fraction: r, the share of the participants in a round, above 0 and at most 1.
        validation_fraction: the share of the participants in the fixed validation cohort, likewise.
        min_reply_fraction: of the clients that are asked, the share that must give a usable answer, likewise.
        meta_lr_decay: `cosine` lowers the meta learning rates to 0 over the rounds; `none` keeps them (the paper).
        seed: of the run.

    Raises:
        ConfigError: a value outside those.
    """

    rounds: int = 100
    patience: int = 100
    client_fraction: float = 0.1
    validation_fraction: float = 1.0
    min_reply_fraction: float = 0.5
    meta_lr_decay: Decay = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        for key in ("client_fraction", "validation_fraction", "min_reply_fraction"):
            value = getattr(self, key)
            if not 0 < value <= 1:
                raise ConfigError(f"federation.{key} is {value}; allowed is above 0 and at most 1.")
        if self.meta_lr_decay not in ("none", "cosine"):
            raise ConfigError(f"federation.meta_lr_decay is '{self.meta_lr_decay}'; allowed are 'none' and 'cosine'.")
        if self.rounds < 0:
            raise ConfigError(f"federation.rounds is {self.rounds}; allowed is at least 0.")
        if self.patience < 1:
            raise ConfigError(f"federation.patience is {self.patience}; allowed is at least 1.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """What the rounds know and never change.

    Attributes:
        settings: how the rounds go.
        participants: the seen clients that take part, in the order of client ids.
        initial: lambda before the first round; its names, shapes and types are those of every lambda.
        net_inputs: the buffers of the nets, which say how their inputs are standardized; sent along with lambda, since
            clients may live in other processes. Where there are none, clients keep theirs.
    """

    settings: RoundSettings
    participants: tuple[Participant, ...]
    initial: Tensors
    net_inputs: Tensors

    def training_clients(self, number: int) -> list[Participant]:
        """Line 3 of Algorithm 1: who trains in round `number`, in the order of client ids."""
        return self._sample(self.settings.client_fraction, "sample", number)

    def validation_clients(self) -> list[Participant]:
        """The fixed cohort that every round is measured on, in the order of client ids."""
        return self._sample(self.settings.validation_fraction, "validation")

    def _sample(self, fraction: float, *key: int | str) -> list[Participant]:
        """A share of the participants without replacement, at least one."""
        count = max(1, round(fraction * len(self.participants)))
        rng = np.random.default_rng(derive_seed(self.settings.seed, *key))
        return [self.participants[i] for i in sorted(rng.choice(len(self.participants), count, replace=False))]


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What a round of training gave.

    Attributes:
        lambda_: the mean of the clients' lambdas.
        meta_loss: the clients' mean validation loss while they trained, weighted by N_i.
        clients: whose lambdas were averaged.
        failures: by name, why a client was left out.
        skipped_steps: meta iterations that were not finite and changed nothing.
    """

    lambda_: Tensors
    meta_loss: float
    clients: tuple[Participant, ...]
    failures: dict[str, str]
    skipped_steps: int


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a lambda is worth: the cohort's mean validation loss, weighted by N_i; infinite if one is not finite.

    Attributes:
        loss: that mean.
        failures: by name, why a client was left out.
    """

    loss: float
    failures: dict[str, str]


def set_up(
    grid: Grid,
    meta_nets: MetaNets,
    names: dict[int, str],
    settings: RoundSettings,
    *,
    base_lr: float | None = None,
    standardize: bool = True,
) -> Federation:
    """Everything before the first round, once: who takes part, and the lambda to begin with.

    Args:
        grid: carries the messages.
        meta_nets: new ones. They are made ready in place, so that whoever holds them reads clients as the rounds do.
        names: of the seen clients, by client id; nodes of other clients take no part.
        settings: how the rounds will go.
        base_lr: what every eta~ starts with; None leaves the nets' own.
        standardize: whether the nets' inputs are standardized by the participants' statistics.

    Raises:
        FederationError: a seen client's node does not answer as it should.
    """
    participants = find_participants(grid, names)
    if base_lr is not None:
        with torch.no_grad():
            meta_nets.base_lr.fill_(base_lr)
    if standardize:
        standardize_inputs(meta_nets, participants)
    return Federation(
        settings=settings,
        participants=participants,
        initial={name: p.detach().clone() for name, p in meta_nets.named_parameters()},
        net_inputs={name: b.detach().clone() for name, b in meta_nets.named_buffers()},
    )


def new_state(federation: Federation) -> MetaState:
    """The state before the first round."""
    return MetaState(lambda_=federation.initial, best_lambda=federation.initial)


def run_rounds(
    grid: Grid,
    federation: Federation,
    state: MetaState,
    *,
    callbacks: Sequence[RoundCallback] = (),
    save: Callable[[MetaState], None] = lambda state: None,
) -> MetaState:
    """Runs Algorithm 1 from where `state` stands.

    The initial lambda is measured as round 0. After each round the new lambda is measured on the fixed cohort; the one
    with the lowest validation loss is kept. Test data play no part.

    Args:
        grid: carries the messages.
        federation: from `set_up`.
        state: a new one, or that of a checkpoint; it is brought up to date.
        callbacks: look on.
        save: called after each round.

    Returns:
        `state`.

    Raises:
        FederationError: a round has too few usable replies.
    """
    settings = federation.settings
    for callback in callbacks:
        callback.on_rounds_start(state, settings.rounds)
    try:
        while state.round < settings.rounds and not state.out_of_patience(settings.patience):
            lambda_, record = run_round(grid, federation, state.lambda_, state.round + 1)
            state.add(record, lambda_)
            save(state)
            for callback in callbacks:
                callback.on_round_end(state, record)
    finally:
        for callback in callbacks:
            callback.on_rounds_end(state)
    return state


def run_round(grid: Grid, federation: Federation, lambda_: Tensors, number: int) -> tuple[Tensors, RoundRecord]:
    """One round: clients train from `lambda_`, and what they made of it is measured. Round 0 only measures."""
    started = time.monotonic()
    training = train(grid, federation, lambda_, number) if number else None
    if training is not None:
        lambda_ = training.lambda_
    validation = validate(grid, federation, lambda_, number)
    record = RoundRecord(
        round=number,
        val_loss=validation.loss,
        failures={f"{name} (validation)": reason for name, reason in validation.failures.items()},
    )
    if training is not None:
        record = replace(
            record,
            meta_loss=training.meta_loss,
            clients=tuple(p.name for p in training.clients),
            failures=training.failures | record.failures,
            skipped_steps=training.skipped_steps,
        )
    return lambda_, replace(record, seconds=time.monotonic() - started)


def train(grid: Grid, federation: Federation, lambda_: Tensors, number: int) -> Training:
    """Lines 3 to 14 of Algorithm 1: a sample of clients learns from `lambda_`; the mean of what they return."""
    return aggregate(federation, number, grid.send_and_receive(training_messages(federation, lambda_, number)))


def training_messages(federation: Federation, lambda_: Tensors, number: int) -> list[Message]:
    """Lines 3 to 5 of Algorithm 1: lambda to a sample of the participants."""
    scale = decayed(federation.settings.meta_lr_decay, number, federation.settings.rounds)
    config = {"server-round": number, "meta-lr-scale": scale}
    return _messages(META_TRAIN, federation.training_clients(number), federation, lambda_, config)


def aggregate(federation: Federation, number: int, replies: Iterable[Message]) -> Training:
    """Line 14 of Algorithm 1: the mean of the clients' lambdas, weighted by their training samples.

    Raises:
        FederationError: too few usable replies.
    """
    read = partial(read_update, template=federation.initial)
    updates, failures = _collected(federation, number, federation.training_clients(number), replies, read)
    mean = WeightedMean()
    for participant, update in updates:
        mean.add(participant.num_samples, update.lambda_)
    return Training(
        lambda_=mean.result(),
        meta_loss=weighted((participant.num_samples, update.meta_loss) for participant, update in updates),
        clients=tuple(participant for participant, _ in updates),
        failures=failures,
        skipped_steps=sum(update.skipped_steps for _, update in updates),
    )


def validate(grid: Grid, federation: Federation, lambda_: Tensors, number: int) -> Validation:
    """Measures `lambda_` on the fixed cohort."""
    return combine_losses(federation, number, grid.send_and_receive(validation_messages(federation, lambda_, number)))


def validation_messages(federation: Federation, lambda_: Tensors, number: int) -> list[Message]:
    """Lambda to the fixed validation cohort."""
    config = {"server-round": number}
    return _messages(META_EVALUATE, federation.validation_clients(), federation, lambda_, config)


def combine_losses(federation: Federation, number: int, replies: Iterable[Message]) -> Validation:
    """The cohort's validation losses as one.

    Raises:
        FederationError: too few usable replies.
    """
    losses, failures = _collected(federation, number, federation.validation_clients(), replies, read_loss)
    loss = sum(p.num_samples * value for p, value in losses) / sum(p.num_samples for p, _ in losses)
    return Validation(loss=loss if math.isfinite(loss) else math.inf, failures=failures)


def decayed(decay: str, number: int, total: int) -> float:
    """What the meta learning rates are multiplied by in step `number` of `total`, counted from 1."""
    return 0.5 * (1 + math.cos(math.pi * (number - 1) / max(total, 1))) if decay == "cosine" else 1.0


def _messages(
    kind: str, chosen: Sequence[Participant], federation: Federation, lambda_: Tensors, config: dict[str, Any]
) -> list[Message]:
    arrays = to_arrays(lambda_)
    net_inputs = to_arrays(federation.net_inputs) if federation.net_inputs else None
    return [instruction(kind, p.node_id, arrays=arrays, net_inputs=net_inputs, config=dict(config)) for p in chosen]


def _collected(
    federation: Federation,
    number: int,
    asked: Sequence[Participant],
    replies: Iterable[Message],
    read: Callable[[RecordDict], Value],
) -> tuple[list[tuple[Participant, Value]], dict[str, str]]:
    """The usable answers in the order of client ids, and by name why the others are of no use."""
    by_node = {participant.node_id: participant for participant in asked}
    usable: list[tuple[Participant, Value]] = []
    failures: dict[str, str] = {}
    for node_id, answer in answers(by_node, replies, read):
        if isinstance(answer, Refusal):
            failures[by_node[node_id].name] = answer.reason
        else:
            usable.append((by_node[node_id], answer))
    fraction = federation.settings.min_reply_fraction
    needed = max(1, math.ceil(fraction * len(asked)))
    if len(usable) < needed:
        name, reason = next(iter(failures.items()))
        raise FederationError(
            f"Round {number}: {len(usable)} of {len(asked)} clients gave a usable answer, {needed} are needed "
            f"(federation.min_reply_fraction {fraction}); '{name}': {reason}."
        )
    return usable, failures
