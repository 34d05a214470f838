"""Ctrl-C and SIGTERM: the first one ends a command in order, the second one at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""The exit code of an interrupted command."""

_SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar has hidden it


class StopSignals:
    """What has come so far.

    Attributes:
        received: whether the user or the system wants the command to end.
    """

    received = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal is a KeyboardInterrupt; the next one ends the process."""
        if self.received:
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)
            os._exit(INTERRUPTED)
        self.received = True
        raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """While this is open, SIGINT and SIGTERM are handled alike; after an interruption they go on to be.

    The end of a process takes its time too (other threads, atexit functions), and a second Ctrl-C then must not print
    a traceback.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():  # only the main one gets signals
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        if not signals.received:
            for number, handler in before.items():
                signal.signal(number, handler)
