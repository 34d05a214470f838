"""The made-up run, anew for every test."""

from typing import Any

import pytest
from made_up_run import make_history, make_results, make_rows

from fedl2p.federation.state import RoundRecord


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture
def history() -> list[RoundRecord]:
    return make_history()


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return make_rows()
