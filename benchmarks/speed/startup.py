"""How long the command line takes to answer, and the package to be imported.

Run:  python -m benchmarks.speed.startup
Time: seconds.
"""

import subprocess
import sys

from benchmarks.speed.measure import Row, command, in_turns

TORCH = "import sys, fedl2p.cli; fedl2p.cli.make_parser(); assert 'torch' not in sys.modules"


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def measure(quick: bool) -> list[Row]:
    """`fedl2p --help` must not wait for torch."""
    repeats = 5 if quick else 15
    _run("-c", TORCH)
    row = in_turns(
        "fedl2p --help",
        lambda: _run("-m", "fedl2p.cli", "--help"),
        lambda: _run("-c", "import torch"),
        against="import torch",
        repeats=repeats,
        note="target: 1 s, without torch",
    )
    light = in_turns(
        "import fedl2p",
        lambda: _run("-c", "import fedl2p"),
        lambda: _run("-c", "pass"),
        against="Python itself",
        repeats=repeats,
    )
    return [row, light]


if __name__ == "__main__":
    command(__doc__, measure)
