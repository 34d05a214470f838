"""Seeds that follow from what is seeded, so that a run repeats whatever the order of its clients and processes."""

import contextlib
import random
import zlib
from collections.abc import Iterator

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**31 from parts such as (run seed, "meta", round, client); different parts, unrelated seeds.

    Args:
        parts: non-negative integers and words.
    """
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


@contextlib.contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Gives code that draws from the global generators of Python, NumPy and torch the same numbers on each start.

    The generators' states from before come back at the end. A GPU's generators take part where they are in use already.

    Args:
        seed: below 2**32.
    """
    import torch  # here, since importing it takes seconds, and most users of this module do without

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the legacy generator is the one that others draw from
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
