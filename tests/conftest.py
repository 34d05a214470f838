"""What tests of all rooms share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedl2p.datamodules.io.files import ENVIRONMENT


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Finds real data by name, in `FEDL2P_DATA` or beside the repository; skips the test where they are absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(ENVIRONMENT) or beside)

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {ENVIRONMENT} or ../shared/data")
        return folder / name

    return find
