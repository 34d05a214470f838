"""What a Lightning Trainer brings for one client: its DataModule's or its own loaders, as lists of batches."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils import _pytree as pytree

from fedl2p.core.distributed import common_seed, own_part
from fedl2p.core.episode import Episode, Limit, limited
from fedl2p.core.functional import Batch
from fedl2p.errors import ConfigError, DataError


class _Loaders:
    """The loaders that a fit was given, under the names that they have in a DataModule."""

    def __init__(self, train: Any, val: Any) -> None:
        self.train_dataloader = lambda: train
        self.val_dataloader = lambda: val


class TrainerData:
    """The batches of a client in a Trainer, on its device and in its precision, each process with its own part.

    The data are those of the Trainer's DataModule, or the loaders of a fit. A test with a test loader alone takes its
    training data from the stage before. Copies of a client are made without its data.

    Attributes:
        group: the processes that share the client's batches; None where there is one.
    """

    def __init__(self) -> None:
        """Nothing is there before a Trainer is."""
        self.group: Any = None
        self._source: Any = None  # a DataModule, or _Loaders
        self._training: list[Iterable[Any]] | None = None  # through a fit, so that each iteration shuffles anew

    def __reduce__(self) -> tuple[type["TrainerData"], tuple[()]]:
        """A copy, in memory or pickled, has no data: they stay where they are."""
        return TrainerData, ()

    def start(self, trainer: L.Trainer, stage: str) -> bool:
        """Prepares for a stage, and the training data too where Lightning asks for another stage only.

        Returns:
            Whether the data are others than before.

        Raises:
            ConfigError: several devices by another strategy than DDP.
            DataError: several devices, and loaders that are divided already.
        """
        datamodule = getattr(trainer, "datamodule", None)
        if stage != "fit" and datamodule is not None:
            datamodule.setup("fit")
        self._training = None
        self.group = None
        if trainer.world_size > 1:
            if not isinstance(trainer.strategy, DDPStrategy):
                raise ConfigError(
                    f"The strategy is {type(trainer.strategy).__name__}; over several devices a client needs 'ddp'."
                )
            if datamodule is None:
                raise DataError(
                    "Over several devices the client needs a DataModule (datamodule=...), since the Trainer has "
                    "already divided the loaders that it was given."
                )
            self.group = torch.distributed.group.WORLD
        return datamodule is not None and self._take(datamodule)

    def start_fit(self, trainer: L.Trainer) -> bool:
        """Takes the loaders that a fit was given; returns whether the data are others than before."""
        if getattr(trainer, "datamodule", None) is not None:
            return False  # `start` has taken it
        # As they were given: a Trainer that does not validate has no loaders for it.
        val = trainer.fit_loop.epoch_loop.val_loop._data_source
        given = val.dataloader() if val.instance is not None and val.is_defined() else None
        return self._take(_Loaders(trainer.train_dataloader, given))

    def _take(self, source: Any) -> bool:
        before, self._source = self._source, source
        return before is not source

    def train(self, trainer: L.Trainer, epochs: int, *, fresh: bool) -> list[Batch]:
        """Passes over the training loader.

        Args:
            trainer: whose.
            epochs: how many passes.
            fresh: whether the loader starts anew, so that each test sees the same order of batches. In a fit one loader
                goes through all iterations.
        """
        if fresh or self._training is None:
            loaders = self._loaders("train")
            self._training = self._training if fresh else loaders
        else:
            loaders = self._training
        with self._equal_order():
            passes = [self._batches(trainer, loaders, trainer.limit_train_batches) for _ in range(epochs)]
        return self._own([batch for batches in passes for batch in batches])

    def val(self, trainer: L.Trainer) -> list[Batch]:
        """One pass over the validation loaders."""
        # Lightning's 0 means no validation of its own; the validation loss is still needed.
        return self._own(self._batches(trainer, self._loaders("val"), trainer.limit_val_batches or None))

    def statistics(self, trainer: L.Trainer) -> list[Batch]:
        """The whole training data, without augmentation where the DataModule has a `statistics_dataloader`."""
        kind = "statistics" if hasattr(self._source, "statistics_dataloader") else "train"
        return self._batches(trainer, self._loaders(kind), None)

    def _loaders(self, kind: str) -> list[Iterable[Any]]:
        """Fresh ones of a DataModule, since the Trainer may be in the middle of its own; or those that were given."""
        given = None if self._source is None else getattr(self._source, f"{kind}_dataloader")()
        if given is None:
            raise DataError(
                f"The client needs its {kind} data, but the Trainer has no loader for them; pass a DataModule "
                "(datamodule=...) with train_dataloader and val_dataloader."
            )
        return list(given.flattened) if isinstance(given, CombinedLoader) else pytree.tree_leaves(given)

    def _batches(self, trainer: L.Trainer, loaders: list[Iterable[Any]], limit: Limit) -> list[Batch]:
        """One pass over each loader, its batches as they would come to a step of the module, the user's hooks done."""
        return [_as_in_a_step(trainer, batch) for loader in loaders for batch in limited(loader, limit)]

    def _own(self, batches: list[Batch]) -> list[Batch]:
        return batches if self.group is None else [own_part(batch, self.group) for batch in batches]

    @contextlib.contextmanager
    def _equal_order(self) -> Iterator[None]:
        """Lets a loader that shuffles by torch's generator give one order in all processes."""
        if self.group is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(common_seed(self.group))
            yield


def _as_in_a_step(trainer: L.Trainer, batch: Any) -> Batch:
    """A batch in the Trainer's precision, through the hooks of the DataModule, and on the device."""
    if isinstance(batch, Episode):
        raise DataError("The client needs batches, but the loaders of its last fit give episodes; pass a DataModule.")
    batch = trainer.lightning_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    return cast(Batch, tuple(trainer.strategy.batch_to_device(batch)))
