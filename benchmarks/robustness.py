"""What lying clients do to the digits federation, to Algorithm 1 as it is written and to a robust one.

Run:  python -m benchmarks.robustness --output runs/robustness [--quick]
Time: with --quick 2 minutes on 2 cores, else about 20.

A share of the seen clients lies in every round; their data stay real. `plain` is the weighted mean with no bound on a
client's influence, `robust` is federation.aggregation=median with all other keys as they are by default. Lambda is
chosen by what clients say of their validation data, liars included; the accuracy is measured afterwards, on the test
data of all seen clients.
"""

import argparse
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedl2p.core.functional import Tensors
from fedl2p.errors import FederationError
from fedl2p.experiment.build import build_data, build_model, build_runtime, build_training
from fedl2p.experiment.config import load_config
from fedl2p.experiment.results import client_table
from fedl2p.federation.client_app import make_client_app, make_cohort_handlers
from fedl2p.federation.fedavg import make_pretrain_app, pretrain
from fedl2p.federation.local import LocalGrid, flower_run
from fedl2p.federation.messages import (
    ARRAYS,
    CONFIG,
    DESCRIBE,
    META_EVALUATE,
    META_TRAIN,
    METRICS,
    NUM_SAMPLES,
    VAL_LOSS,
    to_arrays,
)
from fedl2p.federation.rounds import new_state, run_rounds, set_up
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.federation.settings import RoundSettings
from fedl2p.federation.state import MetaState
from fedl2p.seeding import derive_seed

SHARES = (0.1, 0.3)
PLAIN = {"aggregation": "mean", "max_update_norm": None, "max_client_weight": 1.0, "max_loss_ratio": None}
ROBUST = {"aggregation": "median"}
SEED = 300

Lie = Callable[[RecordDict, RecordDict], RecordDict | Error]
"""(what the client was sent, what it would honestly answer) -> what it answers."""


def _updates(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Lie:
    """Another update of every tensor: a function of the tensor that was sent, and of the honest update."""

    def lie(sent: RecordDict, honest: RecordDict) -> RecordDict:
        tensors: Tensors = {}
        for name, array in honest.array_records[ARRAYS].items():
            start = sent.array_records[ARRAYS][name].numpy()
            new = start + change(start, array.numpy() - start)
            tensors[name] = torch.from_numpy(np.asarray(new, dtype=start.dtype))
        honest[ARRAYS] = to_arrays(tensors)
        return honest

    return lie


def _metric(name: str, value: Callable[[int], float]) -> Lie:
    """Another number, by the round."""

    def lie(sent: RecordDict, honest: RecordDict) -> RecordDict:
        number = sent.config_records[CONFIG]["server-round"]
        assert isinstance(number, int)
        honest[METRICS] = MetricRecord(dict(honest.metric_records[METRICS]) | {name: value(number)})
        return honest

    return lie


def _scaled_statistics(sent: RecordDict, honest: RecordDict) -> RecordDict:
    arrays = {name: array.numpy() * 30 for name, array in honest.array_records[ARRAYS].items()}
    honest[ARRAYS] = to_arrays({name: torch.from_numpy(values) for name, values in arrays.items()})
    return honest


def _noise(start: np.ndarray, update: np.ndarray) -> np.ndarray:
    return np.random.default_rng(start.size).standard_normal(start.shape)


def _broken(sent: RecordDict, honest: RecordDict) -> RecordDict:
    honest[ARRAYS] = ArrayRecord({})
    return honest


KINDS: dict[str, dict[str, Lie]] = {
    "error": {META_TRAIN: lambda sent, honest: Error(code=2, reason="a fault")},
    "no arrays": {META_TRAIN: _broken},
    "not finite": {META_TRAIN: _updates(lambda start, update: update * math.nan)},
    "far away": {META_TRAIN: _updates(lambda start, update: np.full_like(start, 1e3))},
    "backwards": {META_TRAIN: _updates(lambda start, update: -10 * update)},
    "noise": {META_TRAIN: _updates(_noise)},
    "backwards, many samples": {
        META_TRAIN: _updates(lambda start, update: -10 * update),
        DESCRIBE: _metric(NUM_SAMPLES, lambda number: 10**9),
    },
    "impossible vote": {META_EVALUATE: _metric(VAL_LOSS, lambda number: -1e30 if number == 1 else 1.0)},
    "false vote, far away": {
        META_TRAIN: _updates(lambda start, update: np.full_like(start, 1e3)),
        META_EVALUATE: _metric(VAL_LOSS, lambda number: 0.0 if number > 1 else 1e3),
    },
    "false statistics": {DESCRIBE: _scaled_statistics},
}


class LyingGrid(LocalGrid):
    """A local grid in which some clients lie; the others answer as they always do."""

    def __init__(self, runtime: ClientRuntime, client_ids: Sequence[int], liars: Iterable[int], lies: dict[str, Lie]):
        """Sets the nodes up; `lies` are by the type of the message that is answered."""
        super().__init__(make_client_app(runtime), client_ids, cohort_handlers=make_cohort_handlers(runtime))
        nodes = dict(zip(sorted(client_ids), self.get_node_ids(), strict=True))
        self.lies, self.liars = lies, {nodes[client_id] for client_id in liars}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies, some of them changed."""
        sent = {message.metadata.dst_node_id: message for message in messages}
        for answer in super().send_and_receive(sent.values()):
            message = sent[answer.metadata.src_node_id]
            lie = self.lies.get(message.metadata.message_type)
            if answer.metadata.src_node_id in self.liars and lie is not None and answer.has_content():
                answer = Message(lie(message.content, answer.content), reply_to=message)
            yield answer


class Benchmark:
    """One pretrained federation, whose rounds are run again and again with other liars."""

    def __init__(self, quick: bool) -> None:
        """Pretrains the global model; everybody is honest meanwhile."""
        quickly = ["data.init_args.pretrain_clients=4", "data.init_args.seen_clients=20", "client.finetune_epochs=3"]
        config = load_config(
            [
                "configs/digits.yaml",
                f"seed={SEED}",
                "output_dir=unused",
                "data.init_args.unseen_clients=6",
                *(quickly if quick else []),
            ]
        )
        self.rounds = 4 if quick else 20
        self.data = build_data(config)
        pool, self.seen = self.data.pool("pretrain"), self.data.pool("seen")
        model = build_model(config)
        training = build_training(config, self.data, model)
        grid = LocalGrid(make_pretrain_app(training), pool)
        model = pretrain(grid, model, client_ids=pool, rounds=10 if quick else 40, seed=SEED)
        self.runtime = build_runtime(config, self.data, model, base_lr=0.2)
        self.nets = {name: t.clone() for name, t in self.runtime.meta_nets.state_dict().items()}

    def run(self, liars: Sequence[int], lies: dict[str, Lie], settings: dict[str, Any]) -> tuple[float, MetaState]:
        """The accuracy of the lambda that the rounds chose, and what happened in them."""
        self.runtime.meta_nets.load_state_dict(self.nets)
        names = {client_id: self.data.clients[client_id].name for client_id in self.seen}
        grid = LyingGrid(self.runtime, self.seen, liars, lies)
        common = RoundSettings(rounds=self.rounds, client_fraction=1.0, meta_lr_decay="cosine", seed=SEED)
        federation = set_up(grid, self.runtime.meta_nets, names, replace(common, **settings))
        state = run_rounds(grid, federation, new_state(federation))
        recipes = [self.runtime.recipe(state.best_lambda, client_id) for client_id in self.seen]
        measured = self.runtime.evaluate(recipes, self.seen, parts=("test",))
        clients = client_table(self.data, self.seen, measured).values()
        return float(np.mean([100 * client["accuracy"] for client in clients])), state

    def lie(self, kind: str, share: float) -> dict[str, Any]:
        """One row of the table."""
        rng = np.random.default_rng(derive_seed(SEED, "liars"))
        liars = sorted(rng.permutation(self.seen)[: round(share * len(self.seen))].tolist())
        row: dict[str, Any] = {"kind": kind, "share": share}
        for name, settings in (("plain", PLAIN), ("robust", ROBUST)):
            try:
                accuracy, state = self.run(liars, KINDS[kind], settings)
            except FederationError:
                row[name] = {"accuracy": None, "completed": False}
                continue
            row[name] = {"accuracy": round(accuracy, 2), "completed": state.round == self.rounds}
            if name == "robust":
                row["named"] = self._all_named(liars, state)
        return {"kind": kind, "share": share, "named": False} | row

    def _all_named(self, liars: Sequence[int], state: MetaState) -> bool:
        """Whether every liar stands in a round's failures, or among those whose updates were shortened."""
        named = {name.split(" (")[0] for record in state.history for name in (*record.failures, *record.clipped)}
        return {self.data.clients[client_id].name for client_id in liars} <= named


def measure(quick: bool) -> dict[str, Any]:
    """All kinds of lies at both shares."""
    with flower_run():
        benchmark = Benchmark(quick)
        accuracy, _ = benchmark.run([], {}, PLAIN)
        lies = []
        for share in SHARES:
            for kind in KINDS:
                lies.append(benchmark.lie(kind, share))
                print(json.dumps(lies[-1]), flush=True)
    return {"honest": {"accuracy": round(accuracy, 2)}, "lies": lies}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| lie | liars | named | plain | robust |", "| --- | --- | --- | --- | --- |"]
    for row in results["lies"]:
        plain, robust = (
            f"{row[name]['accuracy']:.1f}" if row[name]["completed"] else "ended" for name in ("plain", "robust")
        )
        named = "yes" if row["named"] else "no"
        lines.append(f"| {row['kind']} | {100 * row['share']:.0f} % | {named} | {plain} | {robust} |")
    return f"Honest clients: {results['honest']['accuracy']:.1f} %.\n\n" + "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes `robustness.json`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer clients and rounds")
    parser.add_argument("--output", type=Path, required=True, help="folder for robustness.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    results = measure(options.quick)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "robustness.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
