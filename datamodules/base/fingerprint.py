"""A short hash of each client's data, which tells whether they are still the same."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedl2p.datamodules.base.arrays import ArrayDataset
from fedl2p.datamodules.base.validation import held_tensors, in_memory, read_sample
from fedl2p.pools import ROLES

if TYPE_CHECKING:
    from fedl2p.datamodules.base.federated import ClientData

MAX_READS = 4096
"""Samples of a federation that are read at most where they are not in memory; at least one of each set is."""

Digest = Any  # hashlib's objects have no public type


def client_hash(client: "ClientData", reads: int) -> str:
    """Sixteen hexadecimal digits for what a client has.

    Args:
        client: The client.
        reads: How many samples are read of each set that is not in memory, evenly spaced; at least 1.
    """
    digest = hashlib.sha256()
    _add(digest, [client.pool, client.domain])
    for role in ROLES:
        dataset = getattr(client, role)
        size = len(dataset)
        _add(digest, [role, size])
        if in_memory(dataset):
            _add(digest, held_tensors(dataset))
            if isinstance(dataset, ArrayDataset):
                _add(digest, dataset.arrays.normalization)
        else:
            for position in np.unique(np.linspace(0, size - 1, min(reads, size)).astype(int)):
                _add(digest, read_sample(client, role, int(position)))
    return digest.hexdigest()[:16]


def reads_a_set(num_clients: int) -> int:
    """How many samples of each set are read, so that all clients together keep to `MAX_READS`."""
    return max(1, MAX_READS // (len(ROLES) * num_clients))


def _add(digest: Digest, value: Any) -> None:
    """Adds a value's type, shape and content; of objects that are no data, the type alone."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, str | bytes | int | float | np.generic) or value is None:
        digest.update(f"{value!r};".encode())
    elif isinstance(value, Mapping):
        _add(digest, [part for item in value.items() for part in item])
    elif isinstance(value, Sequence):
        digest.update(f"{len(value)}:".encode())
        for part in value:
            _add(digest, part)
    else:
        digest.update(type(value).__qualname__.encode())
