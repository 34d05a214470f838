"""In a clone, the folders' own names give the same objects as the packages below `fedl2p`."""

import subprocess
import sys
from pathlib import Path

import fedl2p

ROOT = Path(fedl2p.__file__).parents[1]


def check(code: str) -> None:
    """Runs code in a new process that starts in the clone."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_both_names_give_the_same_objects_whichever_comes_first() -> None:
    check("""
import datamodules.io.files
from datamodules import DigitsDataModule
from datamodules.base.federated import FederatedDataModule

import fedl2p.datamodules
from fedl2p.datamodules.base import federated
from fedl2p.datamodules.io import files

assert datamodules is fedl2p.datamodules
assert datamodules.io.files is files
assert FederatedDataModule is federated.FederatedDataModule
assert isinstance(DigitsDataModule(), federated.FederatedDataModule)
assert files.__name__ == files.__spec__.name == "fedl2p.datamodules.io.files"

import fedl2p.callbacks

import callbacks
from callbacks import RoundProgress
from callbacks.metrics_file import MetricsFile

assert callbacks is fedl2p.callbacks
assert RoundProgress is fedl2p.callbacks.progress.RoundProgress
assert MetricsFile is fedl2p.callbacks.MetricsFile

try:
    import datamodules.nothing
except ModuleNotFoundError as error:
    assert str(error) == "No module named 'datamodules.nothing'"
else:
    raise AssertionError("it was imported")
""")
