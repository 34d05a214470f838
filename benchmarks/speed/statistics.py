"""A client's statistics: one streaming pass, once a client, against two passes every round.

Run:  python -m benchmarks.speed.statistics
Time: seconds.
"""

from benchmarks.speed import reference
from benchmarks.speed.cases import Client
from benchmarks.speed.measure import Row, command, in_turns
from fedl2p.core.statistics import collect_statistics


def measure(quick: bool) -> list[Row]:
    """40 images of 32x32 through ResNet-18."""
    client = Client()
    return [
        in_turns(
            "statistics of a client, once",
            lambda: collect_statistics(client.model.module, [x for x, _ in client.train]),
            lambda: reference.statistics(client.plain, client.train),
            against="two passes, every round",
            repeats=5 if quick else 15,
        )
    ]


if __name__ == "__main__":
    command(__doc__, measure)
