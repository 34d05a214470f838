"""Where the rounds stand, on the terminal."""

from rich.console import Console

from fedl2p.federation.state import MetaState, RoundCallback, RoundRecord
from fedl2p.progress import ProgressBar, duration

PLAIN_LINES = 10  # about so many lines a run where there is no terminal


class RoundProgress(RoundCallback):
    """A bar on stderr: rounds done, the validation loss now and at its best, the time left.

    Where stderr is no terminal (a file, a batch system) it prints a plain line about every tenth of the rounds
    instead, without control characters.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        """Sets the console.

        Args:
            console: where to draw; None is stderr.
        """
        self._console = console
        self._bar: ProgressBar | None = None
        self._rounds = 0
        self._seconds: list[float] = []
        self._printed = -1

    def on_rounds_start(self, state: MetaState, rounds: int) -> None:
        """Draws the bar, already filled up to the round that a resumed run continues from."""
        self._stop()
        self._rounds, self._seconds, self._printed = rounds, [], -1
        # Made only now, since stderr may have been redirected after this object was built.
        self._bar = ProgressBar("Rounds", rounds, console=self._console)
        self._bar.move_to(max(state.round, 0), note=_losses(state))
        self._bar.start()

    def on_round_end(self, state: MetaState, record: RoundRecord) -> None:
        """Moves the bar, or prints a line when its turn has come."""
        if self._bar is None:
            return
        if record.round > 0:
            self._seconds.append(record.seconds)
        self._bar.move_to(record.round, note=_losses(state))
        if self._bar.drawn:
            return
        if record.round % max(1, round(self._rounds / PLAIN_LINES)) == 0 or record.round == self._rounds:
            self._print(self._bar.console, state)

    def on_rounds_end(self, state: MetaState) -> None:
        """Leaves the bar as it stands, or prints the last line if it was not printed yet."""
        if self._bar is not None and not self._bar.drawn and state.round > self._printed:
            self._print(self._bar.console, state)
        self._stop()

    def _print(self, console: Console, state: MetaState) -> None:
        self._printed = state.round
        line = f"Round {max(state.round, 0)}/{self._rounds}: {_losses(state)}"
        remaining = self._rounds - state.round
        if self._seconds and remaining > 0:
            seconds = sum(self._seconds) / len(self._seconds) * remaining
            line += f", about {duration(seconds)} left"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def _losses(state: MetaState) -> str:
    if not state.history:
        return "measuring the start"
    now = state.history[-1].val_loss
    return f"val loss {now:.4f}, best {state.best_loss:.4f} (round {state.best_round})"
