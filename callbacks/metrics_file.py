"""`metrics.jsonl`: a line a round."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from fedl2p.errors import RunFolderError
from fedl2p.federation.state import MetaState, RoundCallback, RoundRecord
from fedl2p.io import to_json, write_atomically


class MetricsFile(RoundCallback):
    """Writes every round's record as one line of JSON, at once readable by others.

    When rounds start, the file is made to hold exactly the state's history: a resumed run neither doubles a line
    (one that was written after the last checkpoint) nor lacks one. A loss that is not finite is written as null,
    since JSON has no other word for it.
    """

    def __init__(self, *, path: str | os.PathLike[str]) -> None:
        """Sets the file; nothing is written yet.

        Args:
            path: of the file, usually `<run>/metrics.jsonl`; missing folders are made.
        """
        self.path = Path(path)
        self._file: TextIO | None = None

    def on_rounds_start(self, state: MetaState, rounds: int) -> None:
        """Replaces the file, whole, by the lines of `state.history`.

        Raises:
            RunFolderError: the file cannot be written.
        """
        self._close()
        write_atomically(self.path, "".join(_line(record) for record in state.history))

    def on_round_end(self, state: MetaState, record: RoundRecord) -> None:
        """Appends a line and hands it to the operating system.

        Raises:
            RunFolderError: the file cannot be written.
        """
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise RunFolderError(f"Cannot write {self.path}: {error.strerror or error}.") from error

    def on_rounds_end(self, state: MetaState) -> None:
        """Closes the file."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a line that could not be written either; on_round_end has said so
                self._file.close()
            self._file = None


def _line(record: RoundRecord) -> str:
    return to_json(record.as_dict()) + "\n"
