"""Timing in turns, so that other work on the machine burdens both sides alike; peak memory in a process of its own."""

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        work: what was done.
        value: median.
        reference: what it is compared with.
        reference_value: median.
        ratio: median of the ratios of each turn.
        target: the largest ratio that was asked for, or None.
        note: what else to know.
        unit: of the values: s or MiB.
    """

    work: str
    value: float
    reference: str
    reference_value: float
    ratio: float
    target: float | None = None
    note: str = ""
    unit: str = "s"


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
    """The peak memory of a new process in MiB, after `call = function(*arguments)`, and after `call()`."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        before, after = pool.apply(_peak, (function, arguments))
    return before, after


def _peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, float]:
    call = function(*arguments)
    before = _resident()
    call()
    return before, _resident()


def _resident() -> float:
    """The largest resident size so far, in MiB (getrusage's would begin with that of the process before)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


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
    lines = ["| work | | against | | ratio | target | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        met = "met" if row.target is not None and row.ratio <= row.target else "**not met**"
        target = "" if row.target is None else f"{row.target:.2g} {met}"
        value, reference = _amount(row.value, row.unit), _amount(row.reference_value, row.unit)
        lines.append(
            f"| {row.work} | {value} | {row.reference} | {reference} | {row.ratio:.2f} | {target} | {row.note} |"
        )
    return "\n".join(lines)


def _amount(value: float, unit: str) -> str:
    if unit == "MiB":
        return f"{value:.0f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def command(description: str | None, measure: Callable[[bool], list[Row]], *, output: Path | None = None) -> None:
    """The command line of a benchmark: measures, prints the table, and writes it where an output is named.

    Args:
        description: of the benchmark.
        measure: takes whether to be quick.
        output: a JSON file, beside which the table is written as Markdown; unless another is named.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes of the paper, and more repeats")
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    parser.add_argument("--output", type=Path, default=output, help="a JSON file for the rows")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    rows = measure(not options.full)
    print(table(rows))
    if options.output:
        content = {"machine": machine(), "date": date.today().isoformat(), "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(content, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(f"{machine()}, {content['date']}\n\n{table(rows)}\n")
        print(f"\n{options.output}")
