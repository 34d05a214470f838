"""What comes back: every reply is checked as a whole before anything of it is used.

A client may lie, by malice or by a fault: whatever is not exactly what was asked for is refused with the reason.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, Message, RecordDict
from torch import Tensor

from fedl2p.core.functional import Tensors
from fedl2p.errors import FederationError
from fedl2p.federation.messages import (
    ARRAYS,
    MAX_LOSS,
    META_LOSS,
    METRICS,
    NUM_SAMPLES,
    PARTITION,
    SKIPPED_STEPS,
    VAL_LOSS,
    in_order,
)

MAX_SAMPLES = 10**9  # that one client can hold
MAX_STEPS = 10**6  # that one client can skip in a round
_NUMPY = "numpy.ndarray"  # Flower's name of the one way in which it serializes arrays
_LONGEST_REASON = 300

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
        meta_loss: its mean validation loss meanwhile, which may be out of range.
        skipped_steps: of the K, those that were not finite and changed nothing.
    """

    lambda_: Tensors
    meta_loss: float
    skipped_steps: int


@dataclass(frozen=True, eq=False)
class Description:
    """A client's answer to `query.describe`.

    Attributes:
        client_id: who it says it is.
        num_samples: N_i, its training samples.
        bn_divergence: xi of Eq. 3.
        layer_moments: the mean and standard deviation of every learnable layer's input.
    """

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
        read: a reply's content as a value; it raises where the content is not what was asked for.

    Yields:
        A node id with the value, or with the reason why there is none: silence, an error, or what `read` refused.
    """
    for node_id, message in in_order(node_ids, replies):
        yield node_id, Refusal("no reply") if message is None else _answer(message, read)


def _answer(message: Message, read: Callable[[RecordDict], Value]) -> Value | Refusal:
    try:
        if message.has_error():
            return Refusal(_short(message.error.reason or "an error without a reason"))
        return read(message.content)
    except FederationError as error:
        return Refusal(_short(str(error)))
    except Exception as error:  # whatever a client has put together must not end the run
        return Refusal(f"the reply cannot be read ({type(error).__name__})")


def _short(reason: str) -> str:
    line = " ".join(str(reason).split())
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."


def read_identity(content: RecordDict) -> int:
    """The client that a node says it holds.

    Raises:
        FederationError: the reply is not such an answer, as in all functions here.
    """
    return _whole(_metrics(content, [PARTITION]), PARTITION, 0, 2**63 - 1)


def read_description(content: RecordDict, template: Tensors) -> Description:
    """Who a client is; `template` has `bn_divergence` (B,) and `layer_moments` (2M,)."""
    metrics = _metrics(content, [PARTITION, NUM_SAMPLES], with_arrays=True)
    return Description(
        client_id=_whole(metrics, PARTITION, 0, 2**63 - 1),
        num_samples=_whole(metrics, NUM_SAMPLES, 1, MAX_SAMPLES),
        **_tensors(content, template, "the statistics '{}' are not finite"),
    )


def read_update(content: RecordDict, template: Tensors) -> Update:
    """A client's new lambda, with the names, shapes and types of `template`."""
    metrics = _metrics(content, [NUM_SAMPLES, META_LOSS, SKIPPED_STEPS], with_arrays=True)
    _whole(metrics, NUM_SAMPLES, 1, MAX_SAMPLES)
    return Update(
        lambda_=_tensors(content, template, "the update of '{}' is not finite"),
        meta_loss=_real(metrics, META_LOSS),
        skipped_steps=_whole(metrics, SKIPPED_STEPS, 0, MAX_STEPS),
    )


def read_loss(content: RecordDict) -> float:
    """A client's validation loss, which may be out of range."""
    metrics = _metrics(content, [NUM_SAMPLES, VAL_LOSS])
    _whole(metrics, NUM_SAMPLES, 1, MAX_SAMPLES)
    return _real(metrics, VAL_LOSS)


def read_model(content: RecordDict, template: Tensors) -> tuple[int, Tensors]:
    """The number of samples that a client trained on, and its new model."""
    samples = _whole(_metrics(content, [NUM_SAMPLES], with_arrays=True), NUM_SAMPLES, 1, MAX_SAMPLES)
    return samples, _tensors(content, template, "'{}' is not finite; choose a lower pretraining.lr")


def loss_in_range(loss: float) -> bool:
    """Whether a validation loss can be honest; a client that diverges sends `MAX_LOSS`."""
    return 0 <= loss <= MAX_LOSS


def _metrics(content: RecordDict, names: Sequence[str], *, with_arrays: bool = False) -> dict[str, object]:
    """The numbers of a reply that has the records and the names that were asked for, and no others."""
    records = {METRICS, ARRAYS} if with_arrays else {METRICS}
    if set(content) != records or METRICS not in content.metric_records:
        raise FederationError(f"the reply has the records {_names(content)}; expected are {_names(records)}")
    if with_arrays and ARRAYS not in content.array_records:
        raise FederationError(f"the record '{ARRAYS}' of the reply holds no arrays")
    metrics: dict[str, object] = dict(content.metric_records[METRICS])
    if set(metrics) != set(names):
        raise FederationError(f"the reply has the metrics {_names(metrics)}; expected are {_names(names)}")
    return metrics


def _names(names: Iterable[object]) -> str:
    return ", ".join(repr(str(name)[:40]) for name in sorted(map(str, names))[:5]) or "none"


def _whole(metrics: dict[str, object], name: str, low: int, high: int) -> int:
    value = metrics[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FederationError(f"'{name}' is {str(value)[:40]}; allowed is a whole number from {low} to {high}")
    return value


def _real(metrics: dict[str, object], name: str) -> float:
    value = metrics[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise FederationError(f"'{name}' is a {type(value).__name__}; allowed is one number")
    return float(value)


def _tensors(content: RecordDict, template: Tensors, not_finite: str) -> Tensors:
    """The tensors of a reply: names, shapes and types of `template`, all finite; `not_finite` is the reason if not."""
    arrays = content.array_records[ARRAYS]
    if set(arrays) != set(template):
        missing, extra = set(template) - set(arrays), set(arrays) - set(template)
        raise FederationError(f"other tensors than expected; missing: {_names(missing)}, too many: {_names(extra)}")
    result: Tensors = {}
    for name, reference in template.items():
        tensor = _tensor(arrays[name], name, reference)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FederationError(not_finite.format(name))
        result[name] = tensor.to(reference.device)
    return result


def _tensor(array: Array, name: str, reference: Tensor) -> Tensor:
    """One tensor; its header is read before its data, so that a lie about its size takes no memory."""
    if array.stype != _NUMPY:
        raise FederationError(f"tensor '{name}' is serialized as '{str(array.stype)[:40]}'; allowed is '{_NUMPY}'")
    expected, expected_shape = torch.empty(0, dtype=reference.dtype).numpy().dtype, tuple(reference.shape)
    stream = io.BytesIO(array.data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:
        raise FederationError(f"tensor '{name}' is no array in NumPy's format") from None
    if (dtype, array.dtype) != (expected, str(expected)):
        raise FederationError(f"tensor '{name}' has the type {str(dtype)[:40]}; expected is {expected}")
    if not shape == tuple(array.shape) == expected_shape:
        raise FederationError(f"tensor '{name}' has the shape {str(shape)[:40]}; expected is {expected_shape}")
    if len(array.data) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise FederationError(f"tensor '{name}' has more or less data than its shape {shape} takes")
    values = np.frombuffer(bytearray(array.data), dtype, offset=stream.tell()).reshape(
        shape, order="F" if by_columns else "C"
    )
    # from_numpy keeps 0-d shapes; the clone owns its memory, aligned as torch aligns it, so that runs repeat.
    return torch.from_numpy(values).clone()
