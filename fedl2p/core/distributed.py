"""One client over several processes: each has a part of every batch, and all compute what one process would.

A tensor is either *replicated* (equal in all processes: parameters, statistics, losses) or *sharded* (each process has
its own samples' part). `to_shards` and `from_shards` lead from one kind to the other; each is the other's adjoint, and
both are linear, so gradients, derivatives of gradients, and derivatives in forward mode pass through them. They are the
only places where processes speak to each other.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree


class _ToShards(torch.autograd.Function):
    """The same tensors; their gradients are summed over the processes."""

    @staticmethod
    def forward(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_FromShards.apply(ctx.group, *gradients)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _ToShards.apply(ctx.group, *tangents)


class _FromShards(torch.autograd.Function):
    """The sums of the tensors over the processes, taken in one message; their gradients stay as they are."""

    @staticmethod
    def forward(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return tuple(part.view(tensor.shape).clone() for part, tensor in zip(parts, tensors, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_ToShards.apply(ctx.group, *gradients)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _FromShards.apply(ctx.group, *tangents)


@dataclass(frozen=True)
class Shards:
    """Who shares a batch, and how large it is.

    Attributes:
        group: the processes.
        total: samples of the whole batch.
    """

    group: Any
    total: int

    @classmethod
    def of(cls, group: Any, samples: int) -> "Shards":
        """The batch of which this process has `samples`; all processes of the group call this together."""
        return cls(group, total_count(samples, group))

    def to_shards(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Replicated tensors as they are used on samples."""
        return _ToShards.apply(self.group, *tensors)

    def from_shards(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Sums over all samples, replicated, of each process's sums."""
        return _FromShards.apply(self.group, *tensors)


def total_count(count: int, group: Any) -> int:
    """A number of samples, summed over the processes; as it is where the group is None."""
    if group is None:
        return count
    total = torch.tensor(count, device=_device(group))
    dist.all_reduce(total, group=group)
    return int(total)


def own_part(batch: Any, group: Any) -> Any:
    """This process's part of a batch, any structure of tensors, that all processes have."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.tensor_split(size)[rank], batch)


def common_seed(group: Any) -> int:
    """A random number that all processes agree on."""
    seed = torch.randint(2**31, (), device=_device(group))
    dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    return int(seed)


def _device(group: Any) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
