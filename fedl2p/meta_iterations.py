"""How long a fit of a client lasts: K meta iterations, whatever the Trainer's epochs are."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class MetaIterations(L.Callback):
    """Lets a fit last for K meta iterations, however many epochs of the training loader these are.

    A callback, since Lightning tells a module nothing of an error.
    """

    def __init__(self) -> None:
        self._before: dict[str, int | None] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Puts the Trainer's own limits aside, those from below too."""
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # its mixin has it
            loop = trainer.fit_loop
            self._before = {
                "max_epochs": loop.max_epochs,
                "min_epochs": loop.min_epochs,
                "min_steps": loop.min_steps,
            }
            loop.max_epochs, loop.min_epochs, loop.epoch_loop.min_steps = -1, None, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts the epochs that K iterations are, so that bars show an end."""
        client: Any = pl_module
        iterations = client.settings.meta_iterations
        left = iterations - len(client.val_losses)
        if self._before is None:
            return
        if left <= 0:
            trainer.should_stop = True
        batches = trainer.num_training_batches
        if math.isfinite(batches) and batches > 0:
            done = trainer.fit_loop.batch_idx + 1
            trainer.fit_loop.max_epochs = trainer.current_epoch + max(1, math.ceil((done + left) / batches))
        if self._before["max_epochs"] not in (None, -1, 1, 1000, trainer.fit_loop.max_epochs):
            rank_zero_info(
                f"max_epochs={self._before['max_epochs']} is not used: a fit lasts for meta_iterations={iterations}."
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Ends the fit after K iterations."""
        client: Any = pl_module
        if len(client.val_losses) >= client.settings.meta_iterations:
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the Trainer its limits back."""
        self._restore(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the Trainer its limits back."""
        self._restore(trainer)

    def _restore(self, trainer: L.Trainer) -> None:
        if self._before is not None:
            loop = trainer.fit_loop
            loop.max_epochs, loop.min_epochs = self._before["max_epochs"], self._before["min_epochs"]
            loop.epoch_loop.min_steps = self._before["min_steps"]
            self._before = None
