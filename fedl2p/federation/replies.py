"""What comes back: every reply is checked as a whole before anything of it is used."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedl2p.core.functional import Tensors
from fedl2p.errors import FederationError
from fedl2p.federation.messages import (
    ARRAYS,
    META_LOSS,
    METRICS,
    NUM_SAMPLES,
    PARTITION,
    SKIPPED_STEPS,
    VAL_LOSS,
    from_arrays,
    in_order,
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Refusal:
    """Why a reply is of no use."""

    reason: str


@dataclass(frozen=True, eq=False)
class Update:
    """A client's answer to `train.meta`.

    Attributes:
        lambda_: after its K meta iterations.
        meta_loss: its mean validation loss meanwhile.
        skipped_steps: of the K, those that were not finite and changed nothing.
    """

    lambda_: Tensors
    meta_loss: float
    skipped_steps: int


@dataclass(frozen=True, eq=False)
class Description:
    """A client's answer to `query.describe`: its N_i, and the statistics that the nets read."""

    client_id: int
    num_samples: int
    bn_divergence: Tensor
    layer_moments: Tensor


def answers(
    node_ids: Iterable[int], replies: Iterable[Message], read: Callable[[RecordDict], Value]
) -> Iterator[tuple[int, Value | Refusal]]:
    """What each node answered, in the order of `node_ids`, whatever order the replies come in.

    Args:
        node_ids: who was asked.
        replies: of a grid; one at a time is held where they come in that order.
        read: a reply's content as a value.

    Yields:
        A node id with the value, or with the reason why there is none: silence, an error, or what `read` refused.
    """
    for node_id, message in in_order(node_ids, replies):
        if message is None:
            yield node_id, Refusal("no reply")
        elif message.has_error():
            yield node_id, Refusal(message.error.reason or "an error without a reason")
        else:
            try:
                value: Value | Refusal = read(message.content)
            except FederationError as error:
                value = Refusal(str(error))
            yield node_id, value


def read_identity(content: RecordDict) -> int:
    """The client that a node holds."""
    return int(_number(content, PARTITION))


def read_description(content: RecordDict) -> Description:
    """Who a client is."""
    arrays = content.array_records[ARRAYS]
    return Description(
        client_id=int(_number(content, PARTITION)),
        num_samples=int(_number(content, NUM_SAMPLES)),
        bn_divergence=torch.from_numpy(arrays["bn_divergence"].numpy().copy()),
        layer_moments=torch.from_numpy(arrays["layer_moments"].numpy().copy()),
    )


def read_update(content: RecordDict, template: Tensors) -> Update:
    """A client's new lambda, in the names, shapes and types of `template`.

    Raises:
        FederationError: it is not such a lambda, or not finite.
    """
    lambda_ = from_arrays(content.array_records[ARRAYS], template)
    bad = [name for name, tensor in lambda_.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise FederationError(f"the update of '{bad[0]}' is not finite")
    return Update(lambda_, _number(content, META_LOSS), int(_number(content, SKIPPED_STEPS)))


def read_loss(content: RecordDict) -> float:
    """A client's validation loss."""
    return _number(content, VAL_LOSS)


def read_model(content: RecordDict, template: Tensors) -> tuple[int, Tensors]:
    """The number of samples that a client trained on, and its new model."""
    return int(_number(content, NUM_SAMPLES)), from_arrays(content.array_records[ARRAYS], template)


def _number(content: RecordDict, key: str) -> float:
    value = content.metric_records[METRICS][key]
    assert isinstance(value, int | float)
    return value


def weighted(pairs: Iterable[tuple[float, float]]) -> float:
    """The mean of finite (weight, number) pairs; NaN where there are none."""
    finite = [(weight, number) for weight, number in pairs if math.isfinite(number)]
    return sum(w * n for w, n in finite) / sum(w for w, _ in finite) if finite else math.nan
