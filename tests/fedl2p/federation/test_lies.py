"""Clients that lie: every kind of reply that is not what was asked for, through the local grid."""

import io
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import ConvNet, seeded
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.meta_nets import MetaNets
from fedl2p.errors import FederationError
from fedl2p.federation.aggregation import CLIP_RATIO
from fedl2p.federation.client_app import add_identity_handler
from fedl2p.federation.local import LocalGrid, flower_run
from fedl2p.federation.messages import ARRAYS, METRICS, from_arrays, reply
from fedl2p.federation.rounds import new_state, run_rounds, set_up
from fedl2p.federation.settings import RoundSettings
from fedl2p.federation.state import MetaState

NAMES = {client_id: f"client-{client_id}" for client_id in range(6)}
LIAR = 2

Lie = Callable[[RecordDict], RecordDict | Error | None]
"""Changes an honest reply's content, or gives an error or None for silence."""


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    with flower_run():
        yield


def make_nets() -> MetaNets:
    torch.manual_seed(5)
    return MetaNets(convert_batchnorm(seeded(ConvNet).float()), base_lr=0.1)


def honest_app(nets: MetaNets) -> ClientApp:
    """Statistics, updates and losses that follow from the client's id; nothing is trained."""
    app, template = ClientApp(), dict(nets.named_parameters())
    add_identity_handler(app)

    def client_of(context: Context) -> int:
        return int(context.node_config["partition-id"])

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        own = 1.0 + client_of(context) / 10
        arrays = {
            "bn_divergence": torch.full((len(nets.batchnorm_names),), own),
            "layer_moments": torch.full((2 * len(nets.layer_names),), own),
        }
        return reply(message, arrays=arrays, metrics={"partition-id": client_of(context), "num-samples": 8})

    @app.train("meta")
    def train(message: Message, context: Context) -> Message:
        generator = torch.Generator().manual_seed(client_of(context))
        lambda_ = from_arrays(message.content.array_records[ARRAYS], template)
        new = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in lambda_.items()}
        return reply(message, arrays=new, metrics={"num-samples": 8, "meta-loss": 1.0, "skipped-steps": 0})

    @app.evaluate("meta")
    def evaluate(message: Message, context: Context) -> Message:
        return reply(message, metrics={"num-samples": 8, "val-loss": 1.0 - client_of(context) / 100})

    return app


class LyingGrid(LocalGrid):
    """Changes what one client answers to one type of message."""

    def __init__(self, app: ClientApp, kind: str, lie: Lie) -> None:
        super().__init__(app, NAMES)
        self.kind, self.lie = kind, lie

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for message in messages:
            (answer,) = super().send_and_receive([message])
            if message.metadata.message_type == self.kind and message.metadata.dst_node_id == LIAR + 2:
                told = self.lie(answer.content)
                if told is None:
                    continue
                answer = Message(told, reply_to=message)
            yield answer


def rounds(kind: str, lie: Lie, number: int = 2, **settings: Any) -> MetaState:
    nets = make_nets()
    grid = LyingGrid(honest_app(nets), kind, lie)
    options: dict[str, Any] = {"rounds": number, "client_fraction": 1.0, "seed": 3}
    federation = set_up(grid, nets, NAMES, RoundSettings(**(options | settings)))
    return run_rounds(grid, federation, new_state(federation))


def complaints(state: MetaState) -> list[str]:
    return [reason for record in state.history for name, reason in record.failures.items() if "client-2" in name]


# Lies about arrays


def with_arrays(change: Callable[[dict[str, Array]], dict[str, Array]]) -> Lie:
    def lie(content: RecordDict) -> RecordDict:
        content[ARRAYS] = ArrayRecord(change(dict(content.array_records[ARRAYS])))
        return content

    return lie


def first(make: Callable[[np.ndarray], Array]) -> Lie:
    """Another array in the place of the first one."""

    def change(arrays: dict[str, Array]) -> dict[str, Array]:
        name = next(iter(arrays))
        return arrays | {name: make(arrays[name].numpy())}

    return with_arrays(change)


def raw(values: np.ndarray, **fields: Any) -> Array:
    honest = Array(values)
    given = {"dtype": honest.dtype, "shape": honest.shape, "stype": honest.stype, "data": honest.data}
    return Array(**(given | fields))


def saved(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def huge_header(values: np.ndarray) -> Array:
    """A few bytes that claim to be ten terabytes."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2_500_000_000_000,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return raw(values, data=buffer.getvalue() + b"1234")


def filled(value: float) -> Lie:
    def put(values: np.ndarray) -> Array:
        values = values.copy()
        values.flat[0] = value
        return Array(values)

    return first(put)


def npz(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, values)
    return buffer.getvalue()


ARRAY_LIES: dict[str, Lie] = {
    "NaN": filled(math.nan),
    "infinite": filled(math.inf),
    "minus infinite": filled(-math.inf),
    "float64": first(lambda v: Array(v.astype(np.float64))),
    "float16": first(lambda v: Array(v.astype(np.float16))),
    "longdouble": first(lambda v: Array(v.astype(np.longdouble))),
    "big-endian": first(lambda v: Array(v.astype(">f4"))),
    "integers": first(lambda v: Array(v.astype(np.int64))),
    "flags": first(lambda v: Array(v > 0)),
    "complex": first(lambda v: Array(v.astype(np.complex64))),
    "text": first(lambda v: Array(np.full(v.shape, "text"))),
    "bytes": first(lambda v: Array(np.full(v.shape, b"text"))),
    "dates": first(lambda v: Array(np.full(v.shape, np.datetime64("2020-01-01")))),
    "a structure": first(lambda v: Array(np.zeros(v.shape, [("a", "<f4")]))),
    "one number too many": first(lambda v: Array(np.append(v.reshape(-1), v.dtype.type(0)))),
    "one dimension too many": first(lambda v: Array(v[None])),
    "flat": first(lambda v: Array(v.reshape(-1, 1, 1, 1))),
    "nothing": first(lambda v: Array(np.zeros(0, v.dtype))),
    "a scalar": first(lambda v: Array(np.asarray(v.dtype.type(1)))),
    "garbage": first(lambda v: raw(v, data=b"garbage")),
    "no data": first(lambda v: raw(v, data=b"")),
    "a pickle": first(lambda v: raw(v, data=pickle.dumps(v))),
    "an array of objects": first(lambda v: raw(v, data=saved(np.array([{}, []], object), allow_pickle=True))),
    "cut short": first(lambda v: raw(v, data=saved(v)[:-1])),
    "longer than it says": first(lambda v: raw(v, data=saved(v) + b"more")),
    "an archive": first(lambda v: raw(v, data=npz(v))),
    "a damaged archive": first(lambda v: raw(v, data=b"PK\x03\x04" + bytes(40))),
    "ten terabytes": first(huge_header),
    "another version of the format": first(lambda v: raw(v, data=b"\x93NUMPY\x09\x00" + saved(v)[8:])),
    "a header of code": first(lambda v: raw(v, data=b"\x93NUMPY\x01\x00\x10\x00__import__('os')" + bytes(64))),
    "an unknown serialization": first(lambda v: raw(v, stype="pickle")),
    "another type than it says": first(lambda v: raw(v, dtype="float64")),
    "an odd name of its type": first(lambda v: raw(v, dtype="🤥")),
    "another shape than it says": first(lambda v: raw(v, shape=(1, 2, 3))),
    "a negative shape": first(lambda v: raw(v, shape=(-1,))),
    "no arrays in the record": with_arrays(lambda arrays: {}),
    "an array too few": with_arrays(lambda arrays: dict(list(arrays.items())[1:])),
    "an array too many": with_arrays(lambda arrays: arrays | {"extra": Array(np.zeros(1, np.float32))}),
    "other names": with_arrays(lambda arrays: {f"x{name}": array for name, array in arrays.items()}),
}


# Lies about numbers and records


def metric(**values: Any) -> Lie:
    """Other metrics; underscores stand for hyphens, and None takes one away."""

    def lie(content: RecordDict) -> RecordDict:
        metrics = dict(content.metric_records[METRICS])
        for key, value in values.items():
            metrics[key.replace("_", "-")] = value
        content[METRICS] = MetricRecord({key: value for key, value in metrics.items() if value is not None})
        return content

    return lie


def without(name: str) -> Lie:
    def lie(content: RecordDict) -> RecordDict:
        del content[name]
        return content

    return lie


def extra(name: str, record: Any) -> Lie:
    def lie(content: RecordDict) -> RecordDict:
        content[name] = record
        return content

    return lie


RECORD_LIES: dict[str, Lie] = {
    "silence": lambda content: None,
    "an error": lambda content: Error(code=2, reason="no"),
    "an error without a reason": lambda content: Error(code=0),
    "a very long error": lambda content: Error(code=2, reason="x" * 10**6),
    "an empty reply": lambda content: RecordDict(),
    "no metrics": without(METRICS),
    "metrics of another kind": extra(METRICS, ConfigRecord({"num-samples": 8})),
    "a record too many": extra("more", MetricRecord({"a": 1})),
    "a metric too many": metric(more=1.0),
}

WHOLE: list[Any] = [None, 1.5, [8], [], -1, -(10**15)]
REAL: list[Any] = [None, [0.5], [], [math.nan]]
OUT_OF_RANGE = [math.nan, math.inf, -math.inf, -1e30, 1e30]


def numbers(name: str, values: list[Any]) -> dict[str, Lie]:
    return {f"{name} {value}": metric(**{name: value}) for value in values}


LIES: dict[str, dict[str, Lie]] = {
    "query.identify": RECORD_LIES | numbers("partition_id", [*WHOLE, 3, 77, 10**15]),
    "query.describe": ARRAY_LIES
    | RECORD_LIES
    | {"no arrays": without(ARRAYS), "enormous statistics": filled(1e30)}
    | numbers("partition_id", [*WHOLE, 3, 77])
    | numbers("num_samples", [*WHOLE, 0, 9000, 10**9, 10**15, math.nan]),
    "train.meta": ARRAY_LIES
    | RECORD_LIES
    | {"no arrays": without(ARRAYS), "arrays of another kind": extra(ARRAYS, MetricRecord({"a": 1}))}
    | numbers("meta_loss", [*REAL, *OUT_OF_RANGE])
    | numbers("skipped_steps", [*WHOLE, 10**15, math.nan])
    | numbers("num_samples", [*WHOLE, 0, 10**15]),
    "evaluate.meta": RECORD_LIES
    | {"arrays": extra(ARRAYS, ArrayRecord({"a": Array(np.zeros(1))}))}
    | numbers("val_loss", [*REAL, *OUT_OF_RANGE])
    | numbers("num_samples", [*WHOLE, 0, 10**15]),
}
CASES = [(kind, name) for kind, lies in LIES.items() for name in lies]


def test_there_are_many_lies() -> None:
    assert len(CASES) >= 70


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda part: part.replace(" ", "-"))
def test_a_lie_leaves_its_client_out_by_name_and_the_rounds_go_on(kind: str, name: str) -> None:
    state = rounds(kind, LIES[kind][name])
    assert state.round == 2
    reasons = complaints(state)
    assert reasons
    assert all(reason and len(reason) < 400 and "\n" not in reason for reason in reasons)
    others = {other for record in state.history for other in record.failures if "client-2" not in other}
    # Whoever names another client's id makes that one doubtful too.
    assert others == ({"client-3 (set-up)"} if (kind, name) == ("query.identify", "partition_id 3") else set())
    if kind == "train.meta":
        assert all("client-2" not in record.clients for record in state.history)
    honest = rounds(kind, lambda content: None)
    if not others:
        assert all(torch.equal(t, honest.lambda_[key]) for key, t in state.lambda_.items())
        assert [record.val_loss for record in state.history] == [record.val_loss for record in honest.history]


def test_a_lying_node_cannot_end_the_run_unless_too_few_are_left() -> None:
    with pytest.raises(FederationError, match=r"1 seen clients cannot take part, 6 of 6 must.*'client-2'.*no node"):
        rounds("query.identify", lambda content: None, min_reply_fraction=1.0)


# Poison: replies of the right form


def moved(by: float) -> Lie:
    return with_arrays(lambda arrays: {k: Array((a.numpy() + by).astype(np.float32)) for k, a in arrays.items()})


def length(update: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((t - start[name]).double().square().sum()) for name, t in update.items()))


@pytest.mark.parametrize("by", [1e3, -1e3, 1e30])
def test_a_client_that_moves_lambda_far_away_is_shortened_and_named(by: float) -> None:
    start = {name: p.detach() for name, p in make_nets().named_parameters()}
    honest, poisoned = rounds("train.meta", moved(0.0), 1), rounds("train.meta", moved(by), 1)
    assert honest.history[1].clipped == ()
    assert poisoned.history[1].clipped == ("client-2",)
    assert "client-2" in poisoned.history[1].clients
    assert length(poisoned.lambda_, start) < (1 + CLIP_RATIO) / 6 * 1.5 * 0.01 * math.sqrt(
        sum(t.numel() for t in start.values())
    )


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "krum"])
def test_robust_aggregation_stays_with_the_honest(aggregation: str) -> None:
    start = {name: p.detach() for name, p in make_nets().named_parameters()}
    options: dict[str, Any] = {"aggregation": aggregation, "max_update_norm": None}
    poisoned = rounds("train.meta", moved(1e3), 1, **options)
    one_update = 0.01 * math.sqrt(sum(t.numel() for t in start.values()))
    assert 0 < length(poisoned.lambda_, start) < 1.5 * one_update
    plain = rounds("train.meta", moved(1e3), 1, max_update_norm=None)
    assert length(plain.lambda_, start) > 1e3 * one_update


def test_many_samples_are_no_more_than_a_share_of_the_round() -> None:
    """The liar's update is within bounds, but it claims 900 times as many samples as the others, who have 8 each."""
    start = {name: p.detach() for name, p in make_nets().named_parameters()}

    def step(samples: int, share: float) -> Tensor:
        state = rounds("query.describe", metric(num_samples=samples), 1, max_client_weight=share)
        return (state.lambda_["base_lr"] - start["base_lr"]).double()

    own_share, equal_share = 7200 / 7240, 1 / 6
    own, equal = step(7200, 1.0), step(8, 1.0)
    liar = (own * (1 - equal_share) - equal * (1 - own_share)) / (own_share - equal_share)
    others = (equal - equal_share * liar) / (1 - equal_share)
    torch.testing.assert_close(step(7200, 0.25), 0.25 * liar + 0.75 * others, rtol=0, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "krum"])
def test_robust_aggregation_does_without_updates_that_are_too_long(aggregation: str) -> None:
    poisoned = rounds("train.meta", moved(1e3), 1, aggregation=aggregation)
    silent = rounds("train.meta", lambda content: None, 1, aggregation=aggregation)
    assert complaints(poisoned) == ["its update is longer than federation.max_update_norm"]
    assert all(torch.equal(t, silent.lambda_[name]) for name, t in poisoned.lambda_.items())


@pytest.mark.parametrize("vote", [0.0, 1e6])
def test_a_vote_in_range_decides_nothing_where_the_aggregation_is_robust(vote: float) -> None:
    state = rounds("evaluate.meta", metric(val_loss=vote), aggregation="median")
    assert all(0.94 < record.val_loss < 1.01 for record in state.history)
