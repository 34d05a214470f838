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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedl2p.core.functional import Tensors
from fedl2p.core.meta_nets import MetaNets
from fedl2p.errors import FederationError
from fedl2p.federation.aggregation import bound_weights, clip_updates, combine, middle
from fedl2p.federation.messages import MAX_LOSS, META_EVALUATE, META_TRAIN, instruction, to_arrays
from fedl2p.federation.participants import Participant, find_participants, standardize_inputs
from fedl2p.federation.replies import Refusal, answers, loss_in_range, read_loss, read_update
from fedl2p.federation.settings import RoundSettings
from fedl2p.federation.state import MetaState, RoundCallback, RoundRecord
from fedl2p.seeding import derive_seed

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """What the rounds know and never change.

    Attributes:
        settings: how the rounds go.
        participants: the seen clients that take part, in the order of client ids.
        initial: lambda before the first round; its names, shapes and types are those of every lambda.
        net_inputs: the buffers of the nets, which say how their inputs are standardized; sent along with lambda, since
            clients may live in other processes. Where there are none, clients keep theirs.
        failures: by name, why a seen client cannot take part.
    """

    settings: RoundSettings
    participants: tuple[Participant, ...]
    initial: Tensors
    net_inputs: Tensors
    failures: dict[str, str] = field(default_factory=dict)

    def training_clients(self, number: int) -> list[Participant]:
        """Line 3 of Algorithm 1: who trains in round `number`, in the order of client ids."""
        return self._sample(self.settings.client_fraction, "sample", number)

    def validation_clients(self) -> list[Participant]:
        """The fixed cohort that every round is measured on, in the order of client ids."""
        return self._sample(self.settings.validation_fraction, "validation")

    def needed(self, asked: Sequence[Participant]) -> int:
        """How many of those that are asked must give a usable answer."""
        return max(1, math.ceil(self.settings.min_reply_fraction * len(asked)))

    def _sample(self, fraction: float, *key: int | str) -> list[Participant]:
        """A share of the participants without replacement, at least one."""
        count = max(1, round(fraction * len(self.participants)))
        rng = np.random.default_rng(derive_seed(self.settings.seed, *key))
        return [self.participants[i] for i in sorted(rng.choice(len(self.participants), count, replace=False))]


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What a round of training gave.

    Attributes:
        lambda_: the mean of the clients' lambdas; the old one where most clients diverge from it.
        meta_loss: the clients' mean validation loss while they trained, weighted by N_i; infinite where most diverge.
        failures: by name, why a client was left out.
        skipped_steps: meta iterations that were not finite and changed nothing.
        clients: whose lambdas were averaged.
        clipped: names of the clients whose update was shortened.
    """

    lambda_: Tensors
    meta_loss: float
    failures: dict[str, str]
    skipped_steps: int
    clients: tuple[Participant, ...] = ()
    clipped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a lambda is worth.

    Attributes:
        loss: the cohort's mean validation loss, weighted by N_i; infinite where too few clients say one.
        typical: the median client's, which a few clients who diverge or lie do not move.
        failures: by name, why a client was left out.
    """

    loss: float
    typical: float
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
        FederationError: too few of the clients can take part.
    """
    template = {
        "bn_divergence": meta_nets.base_lr.new_zeros(len(meta_nets.batchnorm_names)),
        "layer_moments": meta_nets.base_lr.new_zeros(2 * len(meta_nets.layer_names)),
    }
    participants, failures = find_participants(grid, names, template, min_reply_fraction=settings.min_reply_fraction)
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
        failures=failures,
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
    settings, unable = federation.settings, _labelled(federation.failures, "set-up")
    for callback in callbacks:
        callback.on_rounds_start(state, settings.rounds)
    try:
        while state.round < settings.rounds and not state.out_of_patience(settings.patience):
            lambda_, record = run_round(grid, federation, state)
            record, unable = replace(record, failures=unable | record.failures), {}  # said once, with the first round
            state.add(record, lambda_)
            save(state)
            for callback in callbacks:
                callback.on_round_end(state, record)
    finally:
        for callback in callbacks:
            callback.on_rounds_end(state)
    return state


def run_round(grid: Grid, federation: Federation, state: MetaState) -> tuple[Tensors, RoundRecord]:
    """The round that comes after `state`, which stays as it is; round 0 only measures.

    Returns:
        The lambda to go on with, and what happened.
    """
    started, number, lambda_ = time.monotonic(), state.round + 1, state.lambda_
    if number == 0:
        validation = validate(grid, federation, lambda_, number)
        record = RoundRecord(round=0, val_loss=validation.loss, failures=_labelled(validation.failures, "validation"))
        return lambda_, replace(record, seconds=time.monotonic() - started)
    training = train(grid, federation, lambda_, number)
    validation = validate(grid, federation, training.lambda_, number)
    ruined = is_ruined(validation.typical, state.best_loss, federation.settings.max_loss_ratio)
    record = RoundRecord(
        round=number,
        val_loss=validation.loss,
        meta_loss=training.meta_loss,
        clients=tuple(participant.name for participant in training.clients),
        failures=training.failures | _labelled(validation.failures, "validation"),
        clipped=training.clipped,
        rolled_back=ruined,
        skipped_steps=training.skipped_steps,
        seconds=time.monotonic() - started,
    )
    return state.best_lambda if ruined else training.lambda_, record


def is_ruined(loss: float, best: float, max_ratio: float | None) -> bool:
    """Whether the typical client's loss is not finite, or far above the best one; never before there is a best one."""
    if max_ratio is None or not math.isfinite(best):
        return False
    return not math.isfinite(loss) or loss > max_ratio * best


def train(grid: Grid, federation: Federation, lambda_: Tensors, number: int) -> Training:
    """Lines 3 to 14 of Algorithm 1: a sample of clients learns from `lambda_`; the mean of what they return."""
    replies = grid.send_and_receive(training_messages(federation, lambda_, number))
    return aggregate(federation, lambda_, number, replies)


def training_messages(federation: Federation, lambda_: Tensors, number: int) -> list[Message]:
    """Lines 3 to 5 of Algorithm 1: lambda to a sample of the participants."""
    scale = decayed(federation.settings.meta_lr_decay, number, federation.settings.rounds)
    config = {"server-round": number, "meta-lr-scale": scale}
    return _messages(META_TRAIN, federation.training_clients(number), federation, lambda_, config)


def aggregate(federation: Federation, lambda_: Tensors, number: int, replies: Iterable[Message]) -> Training:
    """Line 14 of Algorithm 1: the mean of the clients' lambdas, weighted by their training samples.

    Updates that are too long are shortened first, and no client weighs too much; another aggregation may be set.

    Raises:
        FederationError: too few usable replies.
    """
    settings, asked = federation.settings, federation.training_clients(number)
    read = partial(read_update, template=federation.initial)
    answered, failures = _collected(federation, number, asked, replies, read)
    updates, out_of_range = _in_range(answered, lambda update: update.meta_loss)
    skipped_steps = sum(update.skipped_steps for _, update in answered)
    if len(updates) < federation.needed(asked):  # most diverge from this lambda: nothing is learned from them
        return Training(
            lambda_=lambda_, meta_loss=math.inf, failures=failures | out_of_range, skipped_steps=skipped_steps
        )
    lambdas, clipped = clip_updates(lambda_, [update.lambda_ for _, update in updates], settings.max_update_norm)
    clients = tuple(participant for participant, _ in updates)
    if settings.aggregation != "mean" and len(clipped) < len(clients):
        # A robust choice does without the liars: shortened, they would still pull at it from one side.
        out_of_range |= {clients[i].name: "its update is longer than federation.max_update_norm" for i in clipped}
        lambdas = [own for i, own in enumerate(lambdas) if i not in clipped]
        clients, clipped = tuple(p for i, p in enumerate(clients) if i not in clipped), []
        updates = [(p, update) for p, update in updates if p in clients]
    weights = bound_weights([participant.num_samples for participant in clients], settings.max_client_weight)
    return Training(
        lambda_=combine(lambda_, lambdas, weights, settings.aggregation),
        meta_loss=middle([update.meta_loss for _, update in updates], weights, settings.aggregation),
        failures=failures | out_of_range,
        skipped_steps=skipped_steps,
        clients=clients,
        clipped=tuple(clients[position].name for position in clipped),
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
    settings, asked = federation.settings, federation.validation_clients()
    answered, failures = _collected(federation, number, asked, replies, read_loss)
    votes, out_of_range = _in_range(answered, lambda loss: loss)
    failures |= out_of_range
    if len(votes) < federation.needed(asked):
        return Validation(loss=math.inf, typical=math.inf, failures=failures)
    losses = [loss for _, loss in votes]
    weights = bound_weights([participant.num_samples for participant, _ in votes], settings.max_client_weight)
    loss = middle(losses, weights, settings.aggregation)
    return Validation(loss=loss, typical=float(np.median(losses)), failures=failures)


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
    fraction, needed = federation.settings.min_reply_fraction, federation.needed(asked)
    if len(usable) < needed:
        name, reason = next(iter(failures.items()))
        raise FederationError(
            f"Round {number}: {len(usable)} of {len(asked)} clients gave a usable answer, {needed} are needed "
            f"(federation.min_reply_fraction {fraction}); '{name}': {reason}."
        )
    return usable, failures


def _in_range(
    answered: Sequence[tuple[Participant, Value]], loss_of: Callable[[Value], float]
) -> tuple[list[tuple[Participant, Value]], dict[str, str]]:
    """The answers whose loss is in range, and by name why the others are left out."""
    good = [(participant, value) for participant, value in answered if loss_in_range(loss_of(value))]
    reasons = {
        participant.name: f"its validation loss is {loss_of(value):g}; allowed is 0 to {MAX_LOSS:g}"
        for participant, value in answered
        if not loss_in_range(loss_of(value))
    }
    return good, reasons


def _labelled(failures: dict[str, str], label: str) -> dict[str, str]:
    return {f"{name} ({label})": reason for name, reason in failures.items()}
