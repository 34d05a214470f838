"""A made-up federation: records, and a state that has taken them in."""

from collections.abc import Callable

import pytest

from fedl2p.federation.state import MetaState, RoundRecord


def record(number: int, val_loss: float | None = None) -> RoundRecord:
    """Round `number`; its loss falls up to round 5 and then grows."""
    return RoundRecord(
        round=number,
        val_loss=1 + abs(number - 5) / 10 if val_loss is None else val_loss,
        meta_loss=None if number == 0 else 2.0,
        clients=("a", "b"),
        failures={"c": "timeout"} if number == 2 else {},
        skipped_steps=number % 2,
        seconds=3.0,
    )


@pytest.fixture
def make_record() -> Callable[..., RoundRecord]:
    return record


@pytest.fixture
def make_state() -> Callable[[int], MetaState]:
    """A state after rounds 0 to `last`; -1 for one before all."""

    def make(last: int) -> MetaState:
        state = MetaState(lambda_={}, best_lambda={})
        for number in range(last + 1):
            state.add(record(number), {})
        return state

    return make
