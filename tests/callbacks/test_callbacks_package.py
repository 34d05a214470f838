"""The package is light to import and gives what it promises."""

import subprocess
import sys

import pytest

from fedl2p import callbacks


def test_every_promised_name_is_there() -> None:
    for name in callbacks.__all__:
        assert getattr(callbacks, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = callbacks.Nothing


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fedl2p.callbacks", ("wandb", "flwr", "torch", "lightning")),
        (
            "from fedl2p.callbacks import MetricsFile, RoundProgress, WandbRounds, start_wandb",
            ("wandb", "flwr", "lightning"),
        ),
    ],
)
def test_importing_it_pulls_nothing_heavy_in(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
