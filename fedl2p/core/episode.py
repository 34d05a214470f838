"""An episode: all tensors of one meta iteration or of one personalization of one client, and where they come from."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple, cast

from torch import Tensor

from fedl2p.core.finetune import initial_running
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, Tensors
from fedl2p.core.settings import RunningStart
from fedl2p.core.statistics import ClientStatistics

Limit = int | float | None


class Episode(NamedTuple):
    """One client's tensors; a cohort's are stacked along a new first dimension, see `fedl2p.core.cohort.stack`.

    Attributes:
        net_inputs: what the nets read: xi (B,), the layer moments (2M,) and the number of training samples (0-d).
        running: the client's running statistics to start from, see `initial_running`.
        train_batches: one for each step of fine-tuning.
        val_batches: over which the validation loss is averaged.
        test_batches: empty where they are not needed.
        loss_batch: the training batch on which `IFT` takes the training loss; empty without training data.
            (Not None, which cannot be stacked.)
    """

    net_inputs: tuple[Tensor, Tensor, Tensor]
    running: Tensors
    train_batches: Sequence[Batch]
    val_batches: Sequence[Batch]
    test_batches: Sequence[Batch] = ()
    loss_batch: Batch | tuple[()] = ()

    @property
    def cohort_size(self) -> int | None:
        """The number of clients that are stacked, None for one client as it is."""
        xi = self.net_inputs[0]
        return len(xi) if xi.dim() > 1 else None

    def start(self, origin: InnerState) -> InnerState:
        """The state that the client's fine-tuning starts from, with theta_g and all other buffers from `origin`."""
        return InnerState(origin.parameters, {**origin.buffers, **self.running})


def make_episode(
    model: FunctionalModel,
    client_statistics: ClientStatistics,
    train_batches: Sequence[Batch],
    val_batches: Sequence[Batch] = (),
    test_batches: Sequence[Batch] = (),
    *,
    running_start: RunningStart = RunningStart.measured,
) -> Episode:
    """A client's episode from its statistics and batches.

    Args:
        model: the global model.
        client_statistics: of its training data, collected once.
        train_batches: one for each step of fine-tuning.
        val_batches: the validation set.
        test_batches: the test set.
        running_start: see `RunningStart`.
    """
    running = initial_running(model, model.tensors()[1], client_statistics, start=running_start)
    train = list(train_batches)
    return Episode(
        client_statistics.net_inputs(),
        running,
        train,
        list(val_batches),
        list(test_batches),
        train[0] if train else (),
    )


def gather_batches(loader: Iterable[Any], *, epochs: int = 1, limit: Limit = None) -> list[Batch]:
    """Passes over a loader, as one list of batches.

    Args:
        loader: of (inputs, targets); it may shuffle at each pass.
        epochs: how many passes.
        limit: cuts each pass, see `limited`.
    """
    return [cast(Batch, tuple(batch)) for _ in range(epochs) for batch in limited(loader, limit)]


def limited(loader: Iterable[Any], limit: Limit) -> Iterable[Any]:
    """One pass over a loader, cut as Lightning's `limit_*_batches` do.

    Args:
        loader: of batches of any kind.
        limit: None or 1.0 for all batches, an int for so many, a fraction below 1 for that part of them.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return loader
    return islice(loader, limit if isinstance(limit, int) else int(len(cast(Any, loader)) * limit))
