"""A model whose batches are shared by several processes, see `fedl2p.core.distributed`."""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from fedl2p.core.batchnorm import ForwardMode
from fedl2p.core.distributed import Shards, total_count
from fedl2p.core.functional import Batch, FunctionalModel, Inputs, LossFunction, Tensors, batch_size


@dataclass(frozen=True, eq=False)
class ShardedModel(FunctionalModel):
    """A `FunctionalModel` of which every process runs its part of each batch; sums are over all parts.

    Attributes:
        group: the processes, as `torch.distributed` knows them.
    """

    group: Any = None

    @classmethod
    def sharing(cls, model: FunctionalModel, group: Any) -> "ShardedModel":
        """The same model, its batches shared by the processes of `group`."""
        return cls(**{f.name: getattr(model, f.name) for f in fields(FunctionalModel)}, group=group)

    def _spread(
        self, parameters: Tensors, inputs: Inputs, mode: ForwardMode, sums: bool
    ) -> tuple[Tensors, ForwardMode]:
        shards = Shards.of(self.group, batch_size(inputs)) if sums else Shards(self.group, 0)
        mode = replace(mode, shards=shards)
        # Mixed batch norms see to their own tensors.
        others = [name for name in parameters if not self._mixed(name)]
        if not others:
            return parameters, mode
        spread = shards.to_shards(*(parameters[name] for name in others))
        return {**parameters, **dict(zip(others, spread, strict=True))}, mode

    def mean_over_samples(self, loss_fn: LossFunction, outputs: Any, targets: Any) -> Tensor:
        """The mean over the parts of all processes."""
        count = batch_size(targets)
        shards = Shards.of(self.group, count)
        # A process can be without samples; the mean over none would be NaN.
        own = loss_fn(outputs, targets) * (count / shards.total) if count else 0.0 * outputs.sum()
        return shards.from_shards(own)[0]

    def count_samples(self, batch: Batch) -> int:
        """Samples in the whole batch."""
        return total_count(batch_size(batch[1]), self.group)
