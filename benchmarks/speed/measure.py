"""Timing in turns, so that other work on the machine burdens both sides alike; peak memory in a process of its own."""

import argparse
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        work: what was done.
        seconds: median.
        reference: what it is compared with.
        reference_seconds: median.
        ratio: median of the ratios of each turn.
        target: the largest ratio that was asked for, or None.
        note: what else to know.
    """

    work: str
    seconds: float
    reference: str
    reference_seconds: float
    ratio: float
    target: float | None = None
    note: str = ""


def in_turns(
    work: str,
    candidate: Callable[[], Any],
    reference: Callable[[], Any],
    *,
    against: str,
    repeats: int = 5,
    target: float | None = None,
    note: str = "",
) -> Row:
    """Times both once to warm up, then `repeats` times in turns."""
    candidate(), reference()
    pairs = [(_seconds(candidate), _seconds(reference)) for _ in range(repeats)]
    return Row(
        work,
        median(a for a, _ in pairs),
        against,
        median(b for _, b in pairs),
        median(a / b for a, b in pairs),
        target,
        note,
    )


def _seconds(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """MiB that a new process needs at most while it calls `function(*arguments)`, and seconds that the call takes.

    `function` prepares, and returns what is then measured; what is taken before is not counted.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        memory, seconds = pool.apply(_peak, (function, arguments))
    return memory, seconds


def _peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, float]:
    call = function(*arguments)
    before = _resident()
    started = time.perf_counter()
    call()
    return _resident() - before, time.perf_counter() - started


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEBIBYTE


def machine() -> str:
    """The machine and the versions that numbers depend on."""
    processor = "unknown processor"
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.partition(":")[2].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{processor}, {torch.get_num_threads()} threads, {device}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {platform.system()}"
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| work | time | against | its time | ratio | target | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        target = (
            "" if row.target is None else f"{row.target:g} " + ("met" if row.ratio <= row.target else "**not met**")
        )
        lines.append(
            f"| {row.work} | {_time(row.seconds)} | {row.reference} | {_time(row.reference_seconds)} | "
            f"{row.ratio:.2f} | {target} | {row.note} |"
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def command(description: str | None, measure: Callable[[bool], list[Row]]) -> None:
    """The command line of one benchmark: measures, and prints the table.

    Args:
        description: of the benchmark.
        measure: takes whether to be quick.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--full", action="store_true", help="the sizes of the paper, and more repeats")
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file for the rows")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    rows = measure(not options.full)
    print(table(rows))
    if options.output:
        options.output.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2))
