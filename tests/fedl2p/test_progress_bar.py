"""The one progress bar."""

import io
import sys

import pytest
from rich.console import Console

from fedl2p.progress import ProgressBar, draws_bars


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=100, _environ={}), out


def test_on_a_terminal_it_shows_the_job_and_how_far_it_is() -> None:
    screen, out = console(True)
    with ProgressBar("Reading", 4, done=1, console=screen) as bar:
        bar.advance()
        bar.move_to(3, note="nearly")
    assert all(word in out.getvalue() for word in ("Reading", "3/4", "nearly"))


def test_bytes_are_shown_as_bytes() -> None:
    screen, out = console(True)
    with ProgressBar("Downloading", 4_000_000, console=screen, unit="bytes") as bar:
        bar.advance(2_000_000)
    assert "2.0/4.0 MB" in out.getvalue()


@pytest.mark.parametrize(("announce", "printed"), [(True, "Reading ...\n"), (False, "")])
def test_elsewhere_it_is_one_line_or_nothing(announce: bool, printed: str) -> None:
    screen, out = console(False)
    with ProgressBar("Reading", 4, console=screen, announce=announce) as bar:
        bar.advance()
        bar.move_to(3, note="nearly")
    assert not bar.drawn
    assert out.getvalue() == printed


def test_an_error_ends_the_bar_and_goes_on() -> None:
    screen, out = console(True)
    with pytest.raises(ValueError, match="mine"), ProgressBar("Reading", None, console=screen):
        raise ValueError("mine")
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_a_notebook_without_ipywidgets_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not draws_bars(Console(force_jupyter=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert draws_bars(Console(force_jupyter=True))
