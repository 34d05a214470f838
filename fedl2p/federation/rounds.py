"""The server's side of Algorithm 1: the rounds, the choice of the best lambda, patience, and resuming."""

import time
from collections.abc import Callable, Sequence

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedl2p.core.functional import Tensors
from fedl2p.core.meta_nets import MetaNets
from fedl2p.errors import ConfigError
from fedl2p.federation.messages import from_arrays, to_arrays
from fedl2p.federation.state import MetaState, RoundCallback, RoundRecord
from fedl2p.federation.strategy import FedL2PStrategy


def run_rounds(
    grid: Grid,
    strategy: FedL2PStrategy,
    state: MetaState,
    *,
    rounds: int,
    patience: int,
    callbacks: Sequence[RoundCallback] = (),
    save: Callable[[MetaState], None] = lambda state: None,
) -> MetaState:
    """Runs Algorithm 1 from where `state` stands.

    The initial lambda is measured as round 0. After each round the aggregated lambda is measured on the fixed cohort;
    the one with the lowest validation loss is kept. Test data play no part.

    Args:
        grid: carries the messages.
        strategy: after `discover`.
        state: a new one, or that of a checkpoint; it is brought up to date.
        rounds: T, the number of the last round.
        patience: stop after so many rounds without a better lambda; at least 1.
        callbacks: look on.
        save: called after each round.

    Returns:
        `state`.

    Raises:
        FederationError: a round has too few usable replies.
        ConfigError: a patience below 1.
    """
    if patience < 1:
        raise ConfigError(f"federation.patience is {patience}; allowed is at least 1.")
    for callback in callbacks:
        callback.on_rounds_start(state, rounds)
    try:
        if state.round < 0:
            started = time.monotonic()
            val_loss = _validate(grid, strategy, state.lambda_, 0)
            record = RoundRecord(round=0, val_loss=val_loss, failures=_validation_failures(strategy))
            _finish(state, record, state.lambda_, started, callbacks, save)
        while state.round < rounds and not state.out_of_patience(patience):
            _round(grid, strategy, state, callbacks, save)
    finally:
        for callback in callbacks:
            callback.on_rounds_end(state)
    return state


def _round(
    grid: Grid,
    strategy: FedL2PStrategy,
    state: MetaState,
    callbacks: Sequence[RoundCallback],
    save: Callable[[MetaState], None],
) -> None:
    started, number = time.monotonic(), state.round + 1
    messages = strategy.configure_train(number, to_arrays(state.lambda_), ConfigRecord(), grid)
    arrays, metrics = strategy.aggregate_train(number, grid.send_and_receive(messages))
    assert arrays is not None and metrics is not None
    lambda_, failures = from_arrays(arrays, state.lambda_), dict(strategy.failures)
    val_loss = _validate(grid, strategy, lambda_, number)
    meta_loss, clients = metrics["meta-loss"], metrics["clients"]
    assert isinstance(meta_loss, float) and isinstance(clients, list)
    record = RoundRecord(
        round=number,
        val_loss=val_loss,
        meta_loss=meta_loss,
        clients=tuple(strategy.names[int(client_id)] for client_id in clients),
        failures=failures | _validation_failures(strategy),
        skipped_steps=strategy.skipped_steps,
    )
    _finish(state, record, lambda_, started, callbacks, save)


def _validate(grid: Grid, strategy: FedL2PStrategy, lambda_: Tensors, number: int) -> float:
    messages = strategy.configure_evaluate(number, to_arrays(lambda_), ConfigRecord(), grid)
    metrics = strategy.aggregate_evaluate(number, grid.send_and_receive(messages))
    assert metrics is not None
    value = metrics["val-loss"]
    assert isinstance(value, float)
    return value


def _validation_failures(strategy: FedL2PStrategy) -> dict[str, str]:
    return {f"{name} (validation)": reason for name, reason in strategy.failures.items()}


def _finish(
    state: MetaState,
    record: RoundRecord,
    lambda_: Tensors,
    started: float,
    callbacks: Sequence[RoundCallback],
    save: Callable[[MetaState], None],
) -> None:
    record = RoundRecord(**{**vars(record), "seconds": time.monotonic() - started})
    state.add(record, lambda_)
    save(state)
    for callback in callbacks:
        callback.on_round_end(state, record)


def standardize_inputs(meta_nets: MetaNets, strategy: FedL2PStrategy) -> None:
    """Sets the nets' input shift and scale to those of the participants' statistics, see `MetaNets.standardize`."""
    participants = list(strategy.participants.values())
    moments = torch.stack([p.layer_moments for p in participants])
    meta_nets.standardize(
        torch.stack([p.bn_divergence for p in participants]),
        moments,
        moments.new_tensor([float(p.num_samples) for p in participants]),
    )
