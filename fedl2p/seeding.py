"""Seeds that follow from what is seeded, so that a run repeats whatever the order of its clients and processes."""

import zlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**31 from parts such as (run seed, "meta", round, client); different parts, unrelated seeds.

    Args:
        parts: non-negative integers and words.
    """
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1
