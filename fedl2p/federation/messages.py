"""What travels: names of messages and records, and tensors as Flower's arrays and back."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedl2p.core.functional import Tensors
from fedl2p.errors import FederationError

# Message types "<category>.<action>" select the handler of the ClientApp.
IDENTIFY = "query.identify"
DESCRIBE = "query.describe"
PRETRAIN = "train.pretrain"
META_TRAIN = "train.meta"
META_EVALUATE = "evaluate.meta"

PARTITION = "partition-id"  # Flower's key of a node's client
ARRAYS = "arrays"
NET_INPUTS = "net-inputs"
CONFIG = "config"
METRICS = "metrics"
NUM_SAMPLES = "num-samples"
META_LOSS = "meta-loss"
SKIPPED_STEPS = "skipped-steps"
VAL_LOSS = "val-loss"

MAX_LOSS = 1e6  # the largest loss that is sent


def to_arrays(tensors: Tensors) -> ArrayRecord:
    """Tensors by name as an ArrayRecord, in order."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})


def from_arrays(arrays: ArrayRecord, template: Tensors) -> Tensors:
    """The tensors of an ArrayRecord, in the names, order, types and shapes of `template`, on its device.

    Raises:
        FederationError: a name or a shape differs.
    """
    if set(arrays) != set(template):
        missing = sorted(set(template) - set(arrays))[:3]
        raise FederationError(f"A message holds other tensors than expected; missing are {missing or 'none'}.")
    result: Tensors = {}
    for name, reference in template.items():
        # from_numpy keeps 0-d shapes; the clone owns its memory, aligned as torch aligns it, so that runs repeat.
        tensor = torch.from_numpy(arrays[name].numpy()).clone()
        if tensor.shape != reference.shape:
            raise FederationError(
                f"Tensor '{name}' of a message has the shape {tuple(tensor.shape)}, expected {tuple(reference.shape)}."
            )
        result[name] = tensor.to(reference)
    return result


def reply(message: Message, *, arrays: Tensors | None = None, metrics: dict[str, Any] | None = None) -> Message:
    """A reply with tensors and numbers."""
    content = RecordDict()
    if arrays is not None:
        content[ARRAYS] = to_arrays(arrays)
    content[METRICS] = MetricRecord(metrics or {})
    return Message(content, reply_to=message)


def instruction(
    kind: str,
    node_id: int,
    *,
    arrays: ArrayRecord | None = None,
    net_inputs: ArrayRecord | None = None,
    config: dict[str, Any],
) -> Message:
    """A message to a node: a kind, records that many messages may share, and the values that the handler reads."""
    content = RecordDict({CONFIG: ConfigRecord(config)})
    for name, record in ((ARRAYS, arrays), (NET_INPUTS, net_inputs)):
        if record is not None:
            content[name] = record
    return Message(content, dst_node_id=node_id, message_type=kind)


def in_order(node_ids: Iterable[int], replies: Iterable[Message]) -> Iterator[tuple[int, Message | None]]:
    """Replies in the order of `node_ids`, whatever order they come in; None for a node that is silent.

    Only replies that come before their turn wait, so an engine that answers in order keeps one in memory.
    """
    early: dict[int, Message] = {}
    stream = iter(replies)
    for node_id in node_ids:
        while node_id not in early and (message := next(stream, None)) is not None:
            early[message.metadata.src_node_id] = message
        yield node_id, early.pop(node_id, None)
