"""Fixtures of the core's tests."""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves torch's as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
