"""What the rounds pass on: the state that a checkpoint keeps, a record a round, and the callbacks' interface."""

from dataclasses import asdict, dataclass, field
from typing import Any

from fedl2p.core.functional import Tensors
from fedl2p.io import finite_or_none


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round of Algorithm 1, as `metrics.jsonl` and the callbacks see it.

    Attributes:
        round: its number from 1; 0 is the initial lambda, before any training.
        val_loss: of the fixed cohort of seen clients after fine-tuning with the aggregated lambda, weighted by N_i.
        meta_loss: the sampled clients' mean validation loss while they trained, weighted by N_i; None in round 0.
        clients: names of the clients whose updates were averaged.
        failures: by name, why a client was left out.
        clipped: names of the clients whose update was too long, and was shortened.
        rolled_back: whether `val_loss` was so bad that the next round starts from the best lambda instead.
        skipped_steps: meta iterations that were not finite and changed nothing.
        seconds: wall time of the round.
    """

    round: int
    val_loss: float
    meta_loss: float | None = None
    clients: tuple[str, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)
    clipped: tuple[str, ...] = ()
    rolled_back: bool = False
    skipped_steps: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in which a loss that is not finite is null."""
        plain: dict[str, Any] = finite_or_none(asdict(self))
        return plain


@dataclass(kw_only=True)
class MetaState:
    """Where the rounds stand: all that a resumed run needs, since random draws follow from (seed, round, client).

    Attributes:
        lambda_: the current parameters of the nets, by name.
        best_lambda: those with the lowest validation loss.
        best_loss: that loss.
        best_round: its round.
        history: the records so far, from round 0 on.
    """

    lambda_: Tensors
    best_lambda: Tensors
    best_loss: float = float("inf")
    best_round: int = 0
    history: list[RoundRecord] = field(default_factory=list)

    @property
    def round(self) -> int:
        """The last round that is complete; -1 before the initial lambda is measured."""
        return self.history[-1].round if self.history else -1

    def add(self, record: RoundRecord, lambda_: Tensors) -> None:
        """Takes a complete round in; keeps its lambda if it is the best."""
        self.lambda_ = lambda_
        self.history.append(record)
        if record.val_loss < self.best_loss:
            self.best_loss, self.best_round, self.best_lambda = record.val_loss, record.round, lambda_

    def out_of_patience(self, patience: int) -> bool:
        """Whether `patience` rounds have passed without a better lambda."""
        return self.round - self.best_round >= patience


class RoundCallback:
    """Looks at the rounds; every method may be overridden, none changes the state."""

    def on_rounds_start(self, state: MetaState, rounds: int) -> None:
        """Before the first round, or the first after a resume; `rounds` is the number of the last."""

    def on_round_end(self, state: MetaState, record: RoundRecord) -> None:
        """After each round, and after the initial lambda was measured."""

    def on_rounds_end(self, state: MetaState) -> None:
        """After the last round, also when the rounds end by an error or an interruption."""
