"""Logs a client's beta and eta, layer by layer, while its nets are trained, and the recipe that is tested."""

from typing import Any

import lightning as L

from fedl2p.report.hyperparameters import named_values


class HyperparameterLogger(L.Callback):
    """After each meta iteration, sends the client's recipe and its validation loss to every logger of the Trainer.

    The metrics are `beta/<layer>` (0 trusts the pretrained statistics, 1 the client's), `eta/<tensor>` (a learning
    rate, of either sign) and `meta_val_loss`, all at one step: the number of the meta iteration, from 1. The recipe
    that a test or a validation personalized with is sent as `test/beta/<layer>` and so on, at the number of iterations
    before it. Works with any Lightning logger, `WandbLogger` included.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the recipe that this batch's meta iteration used; nothing where the module has none yet."""
        losses: list[float] = getattr(pl_module, "val_losses", [])
        _log(trainer, pl_module, "", {"meta_val_loss": losses[-1]} if losses else {})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the recipe that was validated."""
        if not trainer.sanity_checking:
            _log(trainer, pl_module, "val/", {})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the recipe that was tested."""
        _log(trainer, pl_module, "test/", {})


def _log(trainer: L.Trainer, pl_module: L.LightningModule, prefix: str, metrics: dict[str, float]) -> None:
    recipe: Any = getattr(pl_module, "hyperparameters", None)
    if recipe is None or not trainer.loggers or not trainer.is_global_zero:
        return
    nets: Any = pl_module.meta_nets
    metrics |= {f"{prefix}{kind}/{name}": value for kind, name, value in named_values(recipe, nets)}
    step = len(getattr(pl_module, "val_losses", [])) or trainer.global_step
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)
