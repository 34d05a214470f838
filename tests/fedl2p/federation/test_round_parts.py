"""The parts of a round: who is asked, and how replies become one lambda; with replies made by hand."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fedl2p.errors import ConfigError, FederationError
from fedl2p.federation.client_app import add_identity_handler, error_reply
from fedl2p.federation.local import LocalGrid, flower_run
from fedl2p.federation.messages import META_EVALUATE, META_TRAIN, from_arrays, reply
from fedl2p.federation.participants import find_participants
from fedl2p.federation.rounds import (
    Federation,
    Training,
    Validation,
    aggregate,
    combine_losses,
    decayed,
    training_messages,
    validation_messages,
)
from fedl2p.federation.settings import RoundSettings

LIKE = {"base_lr": torch.zeros(2), "scalar": torch.tensor(0.0)}
SAMPLES = {10: 30, 20: 10, 30: 60, 40: 1}
NAMES = {client_id: f"client-{client_id}" for client_id in SAMPLES}


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    with flower_run():
        yield


def describing_app(change: Callable[[int], None] = lambda client_id: None) -> ClientApp:
    app = ClientApp()
    add_identity_handler(app)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        client_id = int(context.node_config["partition-id"])
        change(client_id)
        arrays = {"bn_divergence": torch.full((1,), float(client_id)), "layer_moments": torch.zeros(2)}
        return reply(
            message, arrays=arrays, metrics={"partition-id": client_id, "num-samples": SAMPLES.get(client_id, 5)}
        )

    return app


class Backwards(LocalGrid):
    """Names its nodes and brings its replies in another order."""

    def get_node_ids(self) -> list[int]:
        return list(super().get_node_ids())[::-1]

    def pull_messages(self, message_ids: Any) -> list[Message]:
        return list(super().pull_messages(message_ids))[::-1]


def make_federation(grid: LocalGrid | None = None, names: dict[int, str] = NAMES, **options: Any) -> Federation:
    settings = RoundSettings(**({"client_fraction": 1.0, "seed": 1} | options))
    participants, failures = find_participants(
        LocalGrid(describing_app(), SAMPLES) if grid is None else grid,
        names,
        {"bn_divergence": torch.zeros(1), "layer_moments": torch.zeros(2)},
        min_reply_fraction=settings.min_reply_fraction,
    )
    return Federation(settings=settings, participants=participants, initial=LIKE, net_inputs={}, failures=failures)


def client_of(federation: Federation, message: Message) -> int:
    nodes = {p.node_id: p.client_id for p in federation.participants}
    return nodes[message.metadata.dst_node_id]


def update(value: float) -> dict[str, Tensor]:
    return {"base_lr": torch.tensor([value, -value]), "scalar": torch.tensor(10 * value)}


def answer(message: Message, value: float, *, loss: float = 1.0, skipped: int = 0) -> Message:
    return reply(message, arrays=update(value), metrics={"num-samples": 1, "meta-loss": loss, "skipped-steps": skipped})


def answers(federation: Federation, values: dict[int, float], losses: dict[int, float] | None = None) -> list[Message]:
    """The replies of a full round; a client without a value raised."""
    replies = []
    for message in training_messages(federation, LIKE, 1):
        client_id = client_of(federation, message)
        if client_id in values:
            replies.append(answer(message, values[client_id], loss=(losses or {}).get(client_id, 1.0), skipped=1))
        else:
            replies.append(error_reply(message, ValueError("no")))
    return replies


def clients(training: Training) -> list[int]:
    return [participant.client_id for participant in training.clients]


# Averages


def test_lambdas_are_weighted_by_training_samples_whatever_a_reply_says() -> None:
    federation = make_federation()
    training = aggregate(federation, LIKE, 1, answers(federation, {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0}))
    expected = (30 * 1 + 10 * 2 + 60 * 3 + 1 * 4) / 101
    torch.testing.assert_close(training.lambda_["base_lr"], torch.tensor([expected, -expected]))
    torch.testing.assert_close(training.lambda_["scalar"], torch.tensor(10 * expected))
    assert clients(training) == [10, 20, 30, 40]
    assert training.failures == {}
    assert training.skipped_steps == 4


def test_the_order_of_replies_changes_no_bit() -> None:
    values = {10: 0.1, 20: 1e7, 30: 0.3, 40: 1e-5}
    federation = make_federation()
    replies = answers(federation, values)
    there, back = (aggregate(federation, LIKE, 1, order).lambda_ for order in (replies, replies[::-1]))
    assert all(torch.equal(there[name], back[name]) for name in LIKE)


def test_a_client_that_raised_is_left_out_and_named() -> None:
    federation = make_federation()
    training = aggregate(federation, LIKE, 1, answers(federation, {10: 1.0, 30: 3.0, 40: 4.0}))
    expected = (30 * 1 + 60 * 3 + 1 * 4) / 91
    torch.testing.assert_close(training.lambda_["base_lr"][0], torch.tensor(expected))
    assert training.failures == {"client-20": "ValueError: no"}
    assert clients(training) == [10, 30, 40]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_left_out_and_named(bad: float) -> None:
    federation = make_federation()
    training = aggregate(federation, LIKE, 1, answers(federation, {10: 1.0, 20: bad, 30: 3.0, 40: 4.0}))
    torch.testing.assert_close(training.lambda_["base_lr"][0], torch.tensor((30 * 1 + 60 * 3 + 1 * 4) / 91))
    assert training.failures == {"client-20": "the update of 'base_lr' is not finite"}
    assert clients(training) == [10, 30, 40]


def test_silence_is_a_failure() -> None:
    federation = make_federation()
    training = aggregate(federation, LIKE, 1, answers(federation, {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0})[1:])
    assert training.failures == {"client-10": "no reply"}


def test_failures_of_a_round_are_forgotten_in_the_next() -> None:
    federation = make_federation()
    training = aggregate(federation, LIKE, 1, answers(federation, {10: 1.0, 30: 3.0}))
    assert set(training.failures) == {"client-20", "client-40"}
    assert aggregate(federation, LIKE, 1, answers(federation, dict.fromkeys(SAMPLES, 1.0))).failures == {}


def test_the_meta_loss_is_weighted_and_leaves_out_what_is_not_finite() -> None:
    federation = make_federation()
    values = dict.fromkeys(SAMPLES, 1.0)
    training = aggregate(
        federation, LIKE, 1, answers(federation, values, {10: 2.0, 20: math.nan, 30: 4.0, 40: math.inf})
    )
    assert training.meta_loss == pytest.approx((30 * 2 + 60 * 4) / 90)


def test_where_most_clients_diverge_lambda_stays_and_they_are_named() -> None:
    federation = make_federation()
    losses = dict.fromkeys((10, 20, 30), math.nan)
    training = aggregate(federation, LIKE, 1, answers(federation, dict.fromkeys(SAMPLES, 1.0), losses))
    assert training.lambda_ is LIKE
    assert training.clients == ()
    assert training.meta_loss == math.inf
    assert set(training.failures) == {"client-10", "client-20", "client-30"}
    assert training.skipped_steps == 4


def test_too_few_good_replies_stop_the_run_with_the_reason() -> None:
    federation = make_federation(min_reply_fraction=0.75)
    aggregate(federation, LIKE, 1, answers(federation, {10: 1.0, 20: 2.0, 30: 3.0}))
    with pytest.raises(FederationError) as caught:
        aggregate(federation, LIKE, 1, answers(federation, {10: 1.0, 20: math.nan}))
    for words in ("Round 1", "1 of 4", "3 are needed", "client-20", "is not finite", "min_reply_fraction 0.75"):
        assert words in str(caught.value)


def test_no_good_reply_at_all_stops_the_run_whatever_the_fraction() -> None:
    federation = make_federation(min_reply_fraction=0.01)
    with pytest.raises(FederationError, match="0 of 4"):
        aggregate(federation, LIKE, 1, answers(federation, {}))


def test_a_client_that_answers_with_other_tensors_is_left_out_and_named() -> None:
    federation = make_federation()
    messages = training_messages(federation, LIKE, 1)
    replies = [answer(message, 1.0) for message in messages[1:]]
    replies.append(reply(messages[0], arrays={"base_lr": torch.zeros(5), "scalar": torch.tensor(0.0)}))
    training = aggregate(federation, LIKE, 1, replies)
    assert set(training.failures) == {"client-10"}


# Validation


def validated(federation: Federation, losses: dict[int, float]) -> Validation:
    replies = []
    for message in validation_messages(federation, LIKE, 1):
        client_id = client_of(federation, message)
        if client_id in losses:
            replies.append(reply(message, metrics={"num-samples": 1, "val-loss": losses[client_id]}))
        else:
            replies.append(error_reply(message, ValueError("no")))
    return combine_losses(federation, 1, replies)


def test_the_validation_loss_is_weighted_by_training_samples() -> None:
    loss = validated(make_federation(), {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0}).loss
    assert loss == pytest.approx((30 * 1 + 10 * 2 + 60 * 3 + 1 * 4) / 101)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e30, 1e30])
def test_a_vote_that_is_out_of_range_is_left_out_and_named(bad: float) -> None:
    validation = validated(make_federation(), {10: 1.0, 20: bad, 30: 3.0, 40: 4.0})
    assert validation.loss == pytest.approx((30 + 60 * 3 + 4) / 91)
    assert validation.failures == {"client-20": f"its validation loss is {bad:g}; allowed is 0 to 1e+06"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_for_most_make_the_round_infinitely_bad(bad: float) -> None:
    validation = validated(make_federation(), {10: bad, 20: bad, 30: bad, 40: 4.0})
    assert validation.loss == math.inf
    assert set(validation.failures) == {"client-10", "client-20", "client-30"}


def test_a_few_clients_that_diverge_make_a_round_bad_but_do_not_move_the_typical_loss() -> None:
    validation = validated(make_federation(), {10: 1.0, 20: 1e6, 30: 3.0, 40: 4.0})
    assert validation.loss > 9e4
    assert validation.typical == 3.5
    assert validation.failures == {}


def test_a_validation_client_that_raised_is_left_out_and_named() -> None:
    validation = validated(make_federation(), {10: 1.0, 30: 3.0, 40: 4.0})
    assert validation.loss == pytest.approx((30 + 60 * 3 + 4) / 91)
    assert validation.failures == {"client-20": "ValueError: no"}


def test_too_few_validation_replies_stop_the_run() -> None:
    with pytest.raises(FederationError, match="1 of 4"):
        validated(make_federation(), {10: 1.0})


# Sampling


def many(grid: type[LocalGrid] = LocalGrid, **options: Any) -> Federation:
    names = {client_id: str(client_id) for client_id in range(40)}
    return make_federation(grid(describing_app(), range(50)), names=names, **options)


def drawn(federation: Federation, number: int) -> list[int]:
    return [p.client_id for p in federation.training_clients(number)]


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 4), (0.25, 10), (1.0, 40), (0.001, 1)])
def test_a_sample_has_the_size_of_its_fraction_and_nobody_twice(fraction: float, count: int) -> None:
    ids = drawn(many(client_fraction=fraction), 3)
    assert len(ids) == len(set(ids)) == count
    assert ids == sorted(ids)
    assert all(client_id < 40 for client_id in ids)


def test_samples_follow_from_the_seed_and_the_round_alone() -> None:
    def draws(federation: Federation, *rounds: int) -> list[list[int]]:
        return [drawn(federation, number) for number in rounds]

    some = {"client_fraction": 0.2}
    assert draws(many(**some), 1, 2, 3) == draws(many(Backwards, **some), 1, 2, 3)
    assert draws(many(**some), 3, 1) == [draws(many(**some), 1, 2, 3)[i] for i in (2, 0)]
    assert len({tuple(d) for d in draws(many(**some), 1, 2, 3)}) == 3
    assert draws(many(**some), 1, 2, 3) != draws(many(seed=2, **some), 1, 2, 3)


def test_everybody_is_sampled_at_some_time() -> None:
    federation = many(client_fraction=0.1)
    assert {client_id for number in range(1, 60) for client_id in drawn(federation, number)} == set(range(40))


def test_the_validation_cohort_is_the_same_in_all_rounds() -> None:
    federation = many(validation_fraction=0.25)
    cohorts = [[m.metadata.dst_node_id for m in validation_messages(federation, LIKE, number)] for number in (0, 1, 7)]
    assert len(cohorts[0]) == 10
    assert cohorts[0] == cohorts[1] == cohorts[2]


def test_messages_carry_lambda_the_round_and_the_scale_of_the_rates() -> None:
    federation = make_federation(rounds=4, meta_lr_decay="cosine")
    messages = training_messages(federation, update(2.0), 3)
    config = messages[0].content.config_records["config"]
    assert messages[0].metadata.message_type == META_TRAIN
    assert config["server-round"] == 3
    assert config["meta-lr-scale"] == pytest.approx(0.5)
    assert torch.equal(
        from_arrays(messages[0].content.array_records["arrays"], LIKE)["base_lr"], update(2.0)["base_lr"]
    )
    assert {m.metadata.message_type for m in validation_messages(federation, LIKE, 3)} == {META_EVALUATE}


# Discovery


def test_participants_are_the_seen_clients_in_order_with_their_statistics() -> None:
    participants = make_federation(Backwards(describing_app(), [*SAMPLES, 99])).participants
    assert [p.client_id for p in participants] == [10, 20, 30, 40]
    assert [p.num_samples for p in participants] == [30, 10, 60, 1]
    assert [float(p.bn_divergence) for p in participants] == [10, 20, 30, 40]


def test_a_seen_client_without_a_node_is_named() -> None:
    with pytest.raises(FederationError, match=r"2 seen clients.*'client-30'"):
        make_federation(LocalGrid(describing_app(), [10, 20]), min_reply_fraction=1.0)


def test_a_client_that_cannot_describe_itself_stops_the_run_with_the_reason() -> None:
    def fail(client_id: int) -> None:
        if client_id == 30:
            raise ValueError("no data here")

    with pytest.raises(FederationError, match="no data here"):
        make_federation(LocalGrid(describing_app(fail), SAMPLES), min_reply_fraction=1.0)


# Settings


@pytest.mark.parametrize("key", ["client_fraction", "validation_fraction", "min_reply_fraction"])
@pytest.mark.parametrize("value", [0, -0.5, 1.5, math.nan])
def test_fractions_outside_0_to_1_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"federation\.{key} is {value}"):
        make_federation(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_update_norm", 0.0, "federation.max_update_norm is 0.0; allowed is above 0, 'auto' or null"),
        ("max_update_norm", math.inf, "federation.max_update_norm is inf"),
        ("max_client_weight", 0.0, "federation.max_client_weight is 0.0"),
        ("max_client_weight", 1.5, "federation.max_client_weight is 1.5"),
        ("max_loss_ratio", 0.5, "federation.max_loss_ratio is 0.5; allowed is 1 or more, or null"),
        ("max_loss_ratio", math.nan, "federation.max_loss_ratio is nan"),
        ("aggregation", "mode", "'mode'; allowed are 'mean', 'median', 'trimmed_mean' and 'krum'"),
        ("rounds", -1, "federation.rounds is -1"),
    ],
)
def test_other_settings_outside_their_range_are_refused_by_name(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        RoundSettings(**{key: value})


def test_an_unknown_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match="'linear'; allowed are 'none' and 'cosine'"):
        make_federation(meta_lr_decay="linear")


def test_cosine_decay_goes_from_one_towards_zero() -> None:
    scales = [decayed("cosine", number, 10) for number in range(1, 11)]
    assert scales[0] == 1.0
    assert scales[5] == pytest.approx(0.5)
    assert scales == sorted(scales, reverse=True)
    assert 0 < scales[-1] < 0.05


def test_without_decay_the_scale_stays_one() -> None:
    assert {decayed("none", number, 10) for number in range(1, 11)} == {1.0}
    assert decayed("cosine", 1, 0) == 1.0
