"""The progress bar on a terminal, and its lines elsewhere."""

import io
from collections.abc import Callable, Iterable

import pytest
from rich.console import Console

from fedl2p.callbacks import RoundProgress
from fedl2p.federation.state import MetaState, RoundRecord

MakeState = Callable[[int], MetaState]
MakeRecord = Callable[..., RoundRecord]


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120, _environ={}), out


def play(callback: RoundProgress, state: MetaState, rounds: int, records: Iterable[RoundRecord]) -> None:
    callback.on_rounds_start(state, rounds)
    for record in records:
        state.add(record, {})
        callback.on_round_end(state, record)
    callback.on_rounds_end(state)


def test_without_a_terminal_about_every_tenth_round_is_a_plain_line(
    make_state: MakeState, make_record: MakeRecord
) -> None:
    screen, out = console(False)
    play(RoundProgress(console=screen), make_state(-1), 50, map(make_record, range(51)))
    lines = out.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"Round {n}/50" for n in range(0, 51, 5)]
    assert lines[0] == "Round 0/50: val loss 1.5000, best 1.5000 (round 0)"
    assert lines[2] == "Round 10/50: val loss 1.5000, best 1.0000 (round 5), about 2 min 00 s left"
    assert "left" not in lines[-1]
    assert all(character.isprintable() or character == "\n" for character in out.getvalue())


def test_short_runs_print_every_round(make_state: MakeState, make_record: MakeRecord) -> None:
    screen, out = console(False)
    play(RoundProgress(console=screen), make_state(-1), 3, map(make_record, range(4)))
    assert len(out.getvalue().splitlines()) == 4


def test_rounds_that_stop_early_print_the_last_one(make_state: MakeState, make_record: MakeRecord) -> None:
    screen, out = console(False)
    play(RoundProgress(console=screen), make_state(-1), 100, map(make_record, range(24)))
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == [
        "Round 0/100",
        "Round 10/100",
        "Round 20/100",
        "Round 23/100",
    ]


def test_on_a_terminal_a_bar_shows_rounds_and_losses(make_state: MakeState, make_record: MakeRecord) -> None:
    screen, out = console(True)
    play(RoundProgress(console=screen), make_state(-1), 8, map(make_record, range(9)))
    shown = out.getvalue()
    assert "8/8" in shown
    assert "val loss 1.3000, best 1.0000 (round 5)" in shown
    assert "\x1b[" in shown


def test_the_bar_starts_at_the_resumed_round(make_state: MakeState) -> None:
    screen, out = console(True)
    callback, state = RoundProgress(console=screen), make_state(6)
    callback.on_rounds_start(state, 8)
    callback.on_rounds_end(state)
    assert "6/8" in out.getvalue()
    assert "val loss 1.1000, best 1.0000 (round 5)" in out.getvalue()


def test_a_start_without_history_and_an_error_at_once_are_no_trouble(make_state: MakeState) -> None:
    for terminal in (False, True):
        screen, out = console(terminal)
        callback = RoundProgress(console=screen)
        callback.on_rounds_start(make_state(-1), 5)
        callback.on_rounds_end(make_state(-1))
        assert "best" not in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_events_without_a_start_show_nothing(terminal: bool, make_state: MakeState, make_record: MakeRecord) -> None:
    screen, out = console(terminal)
    callback = RoundProgress(console=screen)
    callback.on_round_end(make_state(1), make_record(1))
    callback.on_rounds_end(make_state(1))
    callback.on_rounds_end(make_state(1))
    assert out.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_second_start_begins_anew(terminal: bool, make_state: MakeState, make_record: MakeRecord) -> None:
    screen, out = console(terminal)
    callback = RoundProgress(console=screen)
    callback.on_rounds_start(make_state(-1), 9)  # never ended
    play(callback, make_state(-1), 2, map(make_record, range(3)))
    assert "2/2" in out.getvalue()


def test_it_writes_to_stderr(
    capsys: pytest.CaptureFixture[str], make_state: MakeState, make_record: MakeRecord
) -> None:
    play(RoundProgress(), make_state(-1), 1, map(make_record, range(2)))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Round 1/1" in captured.err
