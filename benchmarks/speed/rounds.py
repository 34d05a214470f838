"""Federated rounds of the demo's network on engine `local`: time, overhead and memory by the number of clients.

Run:  python -m benchmarks.speed.rounds
Time: 2 minutes on 2 cores.
"""

from collections.abc import Callable
from dataclasses import replace

from benchmarks.speed.cases import small_runtime
from benchmarks.speed.measure import Row, command, in_turns, peak_memory
from fedl2p.federation.client_app import make_client_app, make_cohort_handlers
from fedl2p.federation.local import LocalGrid, flower_run
from fedl2p.federation.rounds import new_state, run_rounds, set_up
from fedl2p.federation.settings import RoundSettings


def federation(clients: int, rounds: int = 1) -> Callable[[], None]:
    """A whole federation, ready to run `rounds` rounds in which all clients take part."""
    data, runtime = small_runtime(clients)
    names = {i: data.clients[i].name for i in data.pool("seen")}
    settings = RoundSettings(client_fraction=1.0, validation_fraction=1.0, rounds=rounds, patience=rounds, seed=0)

    def run() -> None:
        with flower_run():
            handlers = make_cohort_handlers(runtime)
            grid = LocalGrid(make_client_app(runtime), data.pool("seen"), cohort_handlers=handlers)
            ready = set_up(grid, runtime.meta_nets, names, settings)
            run_rounds(grid, ready, new_state(ready))

    return run


def measure(quick: bool) -> list[Row]:
    """Cohorts against one client at a time, a round's overhead, and memory as clients grow in number."""
    repeats = 3 if quick else 7
    rows = []
    _, one = small_runtime(20, cohort_size=None)
    ids = list(range(20))
    lambdas = [one.lambda_()] * 20
    alone = small_runtime(20, cohort_size=1)[1]
    stacked = in_turns(
        "meta update, demo net, cohort of 20",
        lambda: one.meta_update(lambdas, ids, 1),
        lambda: alone.meta_update(lambdas, ids, 1),
        against="the same clients one by one",
        repeats=repeats,
        target=1 / 1.8,
    )
    rows.append(stacked)
    trainer = small_runtime(20, trainer={})[1]
    rows.append(
        in_turns(
            "meta update, demo net, cohort of 20",
            lambda: one.meta_update(lambdas, ids, 1),
            lambda: trainer.meta_update(lambdas, ids, 1),
            against="a Trainer each",
            repeats=repeats,
            target=0.6,
        )
    )
    clients = 100
    whole, (_, bare) = federation(clients), small_runtime(clients)
    many, starts = list(range(clients)), [bare.lambda_()] * clients

    def compute() -> None:
        recipes = [bare.recipe(starts[0], i) for i in many]
        for _ in range(2):  # the initial evaluation, and the one after the round
            bare.evaluate(recipes, many)
        bare.meta_update(starts, many, 1)

    row = in_turns(f"a round of {clients} clients", whole, compute, against="its compute alone", repeats=repeats)
    overhead = 1000 * (row.value - row.reference_value) / clients
    rows.append(replace(row, note=f"{overhead:.1f} ms of overhead a client (target: 5)"))
    for few, more, target in ((10, 100, None), (100, 1000, 1.1)):
        a, b = peak_memory(federation, few)[1], peak_memory(federation, more)[1]
        work = f"peak memory of a round of {more} clients"
        rows.append(Row(work, b, f"{few} clients", a, b / a, target, unit="MiB"))
    return rows


if __name__ == "__main__":
    command(__doc__, measure)
