"""What a Lightning Trainer brings for one client: its DataModule's or its own loaders, as lists of batches."""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fedl2p.core.distributed import common_seed, own_part
from fedl2p.core.episode import gather_batches
from fedl2p.core.functional import Batch
from fedl2p.errors import ConfigError, DataError


class TrainerData:
    """The batches of a client in a Trainer, on its device and in its precision, each process with its own part.

    Attributes:
        group: the processes that share the client's batches; None where there is one.
    """

    def __init__(self) -> None:
        """Nothing is there before a Trainer is."""
        self.group: Any = None
        self._training: Iterable[Any] | None = None  # one loader through a fit, so that each iteration shuffles anew
        self._remembered: dict[str, Any] = {}  # of the last fit, for a test that brings no training data

    def start(self, trainer: L.Trainer, stage: str) -> None:
        """Prepares for a stage, and the training data too where Lightning asks for another stage only.

        Raises:
            ConfigError: several devices by another strategy than DDP.
            DataError: several devices, and loaders that are divided already.
        """
        datamodule = _datamodule(trainer)
        if stage != "fit" and datamodule is not None:
            datamodule.setup("fit")
        self._training = None
        self.group = None
        if trainer.world_size == 1:
            return
        if not isinstance(trainer.strategy, DDPStrategy):
            raise ConfigError(
                f"The strategy is {type(trainer.strategy).__name__}; over several devices a client needs 'ddp'."
            )
        if datamodule is None:
            raise DataError(
                "Over several devices the client needs a DataModule (datamodule=...), since the Trainer has already "
                "divided the loaders that it was given."
            )
        self.group = torch.distributed.group.WORLD

    def remember(self, trainer: L.Trainer) -> None:
        """Keeps the loaders that a fit was given, so that a test after it needs no others."""
        if _datamodule(trainer) is None:
            self._remembered = {"train": trainer.train_dataloader, "val": _val_loader(trainer)}

    def train(self, trainer: L.Trainer, epochs: int, *, fresh: bool) -> list[Batch]:
        """Passes over the training loader.

        Args:
            trainer: whose.
            epochs: how many passes.
            fresh: whether the loader starts anew, so that each test sees the same order of batches. In a fit one loader
                goes through all iterations.
        """
        if fresh or self._training is None:
            loader = self._loader(trainer, "train")
            self._training = self._training if fresh else loader
        else:
            loader = self._training
        with self._equal_order():
            batches = gather_batches(loader, epochs=epochs, limit=trainer.limit_train_batches)
        return self._own(trainer, batches)

    def val(self, trainer: L.Trainer) -> list[Batch]:
        """One pass over the validation loader."""
        return self._own(trainer, gather_batches(self._loader(trainer, "val"), limit=trainer.limit_val_batches or None))

    def statistics(self, trainer: L.Trainer) -> list[Batch]:
        """The whole training data, without augmentation where the DataModule has a `statistics_dataloader`."""
        loader = getattr(_datamodule(trainer), "statistics_dataloader", None)
        return _to_device(trainer, gather_batches(loader() if loader is not None else self._loader(trainer, "train")))

    def _own(self, trainer: L.Trainer, batches: list[Batch]) -> list[Batch]:
        if self.group is not None:
            batches = [own_part(batch, self.group) for batch in batches]
        return _to_device(trainer, batches)

    @contextlib.contextmanager
    def _equal_order(self) -> Iterator[None]:
        """Lets a loader that shuffles by torch's generator give one order in all processes."""
        if self.group is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(common_seed(self.group))
            yield

    def _loader(self, trainer: L.Trainer, kind: str) -> Iterable[Any]:
        """A fresh one of the DataModule, since the Trainer may be in the middle of its own; or what it was given."""
        datamodule = _datamodule(trainer)
        if datamodule is not None:
            return cast(Iterable[Any], getattr(datamodule, f"{kind}_dataloader")())
        given = trainer.train_dataloader if kind == "train" else _val_loader(trainer)
        given = given if given is not None else self._remembered.get(kind)
        if given is None:
            raise DataError(
                f"The client needs its {kind} data, but the Trainer has no loader for them; pass a DataModule "
                "(datamodule=...) with train_dataloader and val_dataloader."
            )
        return list(chain.from_iterable(given)) if isinstance(given, list | tuple) else given


def _datamodule(trainer: L.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _val_loader(trainer: L.Trainer) -> Any:
    if trainer.val_dataloaders is None:
        with contextlib.suppress(MisconfigurationException):  # there are none, which `TrainerData` says
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return trainer.val_dataloaders


def _to_device(trainer: L.Trainer, batches: Iterable[Batch]) -> list[Batch]:
    strategy, precision = trainer.strategy, trainer.precision_plugin
    return [cast(Batch, tuple(precision.convert_input(strategy.batch_to_device(list(b))))) for b in batches]
