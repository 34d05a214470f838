"""One progress bar for all that takes long: on a terminal and in a notebook a bar, elsewhere plain lines or nothing."""

import importlib.util
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_COUNTS: dict[str, tuple[type[ProgressColumn], ...]] = {
    "steps": (MofNCompleteColumn,),
    "bytes": (DownloadColumn, TransferSpeedColumn),
}


def draws_bars(console: Console) -> bool:
    """Whether a bar can move there: on a terminal, and in a notebook that has ipywidgets."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


class ProgressBar:
    """A bar for one job, used by `with`; where none can be drawn all its methods do nothing.

        with ProgressBar("Testing all methods", total=7) as bar:
            bar.advance()

    Attributes:
        console: where it is drawn.
        drawn: whether it is.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        done: int = 0,
        console: Console | None = None,
        unit: Literal["steps", "bytes"] = "steps",
        transient: bool = False,
        announce: bool = False,
    ) -> None:
        """Sets the bar up; it appears when it is entered.

        Args:
            description: of the job, a few words.
            total: steps or bytes of the whole job; None where nobody knows.
            done: of them before the start.
            console: where to draw; None is standard error as it is at the start.
            unit: what is counted.
            transient: the bar goes when the job is done.
            announce: where no bar can be drawn, print one line at the start.
        """
        self.console = console if console is not None else Console(stderr=True)
        self.drawn = draws_bars(self.console)
        self._announcement = f"{description} ..." if announce and not self.drawn else None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if self.drawn:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                *(column() for column in _COUNTS[unit]),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(),
                console=self.console,
                transient=transient,
            )
            self._task = self._progress.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        """Draws the bar."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the bar as it stands, or takes a transient one away."""
        self.stop()

    def start(self) -> None:
        """Draws the bar; a second call changes nothing."""
        if self._announcement is not None:
            self.console.print(self._announcement, markup=False, highlight=False)
            self._announcement = None
        if self._progress is not None:
            self._progress.start()

    def stop(self) -> None:
        """Ends it."""
        if self._progress is not None:
            self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """Moves on by `count` steps or bytes."""
        if self._progress is not None:
            self._progress.advance(self._task, count)

    def move_to(self, done: int, *, note: str = "") -> None:
        """Sets how much is done, and the words beside the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)


def duration(seconds: float) -> str:
    """Such as `2 h 05 min`, `3 min 20 s` or `7 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
