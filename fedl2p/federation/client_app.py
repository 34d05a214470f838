"""The ClientApp: Flower's messages in, the runtime's answers out; one client at a time, or a cohort."""

import math
from collections.abc import Callable, Sequence

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedl2p.core.functional import Tensors
from fedl2p.federation.messages import (
    ARRAYS,
    CONFIG,
    MAX_LOSS,
    META_EVALUATE,
    META_LOSS,
    META_TRAIN,
    NET_INPUTS,
    NUM_SAMPLES,
    PARTITION,
    SKIPPED_STEPS,
    VAL_LOSS,
    from_arrays,
    reply,
)
from fedl2p.federation.runtime import ClientRuntime

CLIENT_ERROR = 2  # Flower's code for an exception in a ClientApp

CohortHandler = Callable[[Sequence[Message], Sequence[Context]], list[Message]]


def make_client_app(runtime: ClientRuntime) -> ClientApp:
    """The app of a node that holds the client `context.node_config["partition-id"]`; see `add_meta_handlers`."""
    app = ClientApp()
    add_identity_handler(app)
    add_meta_handlers(app, lambda: runtime)
    return app


def add_identity_handler(app: ClientApp) -> None:
    """Lets `app` answer `query.identify`: which client it holds."""

    @app.query("identify")
    def identify(message: Message, context: Context) -> Message:
        return reply(message, metrics={PARTITION: _client_id(context)})


def add_meta_handlers(app: ClientApp, runtime: Callable[[], ClientRuntime]) -> None:
    """Lets `app` take part in Algorithm 1.

    It answers `query.describe` (who the client is, and its statistics), `train.meta` (K meta iterations from the lambda
    that it is sent) and `evaluate.meta` (validation loss after fine-tuning with that lambda's recipe).

    Args:
        app: of a node.
        runtime: called with each message, so that a process which never gets one need not build any.
    """

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        client_id = _client_id(context)
        statistics = runtime().statistics(client_id)
        arrays = {"bn_divergence": statistics.bn_divergence, "layer_moments": statistics.layer_moments}
        metrics = {PARTITION: client_id, NUM_SAMPLES: statistics.num_samples}
        return reply(message, arrays=arrays, metrics=metrics)

    @app.train("meta")
    def train(message: Message, context: Context) -> Message:
        return _train(runtime(), [message], [context])[0]

    @app.evaluate("meta")
    def evaluate(message: Message, context: Context) -> Message:
        return _evaluate(runtime(), [message], [context])[0]


def make_cohort_handlers(runtime: ClientRuntime) -> dict[str, CohortHandler]:
    """Handlers of many messages at once, by message type: the same work as the app's, stacked where shapes agree."""

    def train(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        return _train(runtime, messages, contexts)

    def evaluate(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        return _evaluate(runtime, messages, contexts)

    return {META_TRAIN: train, META_EVALUATE: evaluate}


def _train(runtime: ClientRuntime, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    template = _prepared(runtime, messages)
    lambdas = [from_arrays(message.content.array_records[ARRAYS], template) for message in messages]
    client_ids = [_client_id(context) for context in contexts]
    number, scale = _value(messages[0], "server-round"), _value(messages[0], "meta-lr-scale")
    updates = runtime.meta_update(lambdas, client_ids, int(number), meta_lr_scale=scale)
    replies = []
    for message, client_id, update in zip(messages, client_ids, updates, strict=True):
        losses = [float(loss) for loss in update.val_losses if math.isfinite(float(loss))]
        metrics = {
            NUM_SAMPLES: runtime.statistics(client_id).num_samples,
            META_LOSS: bounded_loss(sum(losses) / len(losses) if losses else math.nan),
            SKIPPED_STEPS: update.skipped,
        }
        replies.append(reply(message, arrays=update.lambda_, metrics=metrics))
    return replies


def _evaluate(runtime: ClientRuntime, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    template = _prepared(runtime, messages)
    client_ids = [_client_id(context) for context in contexts]
    recipes = [
        runtime.recipe(from_arrays(message.content.array_records[ARRAYS], template), client_id)
        for message, client_id in zip(messages, client_ids, strict=True)
    ]
    measured = runtime.evaluate(recipes, client_ids)
    return [
        reply(
            message,
            metrics={
                NUM_SAMPLES: runtime.statistics(client_id).num_samples,
                VAL_LOSS: bounded_loss(parts["val"].val_loss),
            },
        )
        for message, client_id, parts in zip(messages, client_ids, measured, strict=True)
    ]


def bounded_loss(loss: float) -> float:
    """What an honest client says of a loss: where it diverges, `MAX_LOSS`, since anything beyond is taken for a lie."""
    return loss if loss <= MAX_LOSS else MAX_LOSS  # NaN too


def _prepared(runtime: ClientRuntime, messages: Sequence[Message]) -> Tensors:
    """Takes over how the nets' inputs are standardized, which all messages of a round say alike; returns any lambda."""
    record = messages[0].content.array_records.get(NET_INPUTS)
    if record is not None:
        inputs = dict(runtime.meta_nets.named_buffers())
        for name, tensor in from_arrays(record, inputs).items():
            inputs[name].copy_(tensor)
    return runtime.lambda_()


def error_reply(message: Message, error: Exception) -> Message:
    """What Flower's engines answer for a client that raised."""
    return Message(Error(code=CLIENT_ERROR, reason=f"{type(error).__name__}: {error}"), reply_to=message)


def _client_id(context: Context) -> int:
    return int(context.node_config[PARTITION])


def _value(message: Message, key: str) -> float:
    value = message.content.config_records[CONFIG][key]
    assert isinstance(value, int | float)
    return value
