"""Logs a client's beta and eta, layer by layer, while its nets are trained."""

from typing import Any

import lightning as L

from fedl2p.report.hyperparameters import named_values


class HyperparameterLogger(L.Callback):
    """After each training batch, sends the client's recipe to every logger of the Trainer.

    The metrics are `beta/<layer>` (0 trusts the pretrained statistics, 1 the client's) and `eta/<tensor>` (a learning
    rate, of either sign), at the Trainer's global step, which counts the steps that changed the nets: after a
    skipped one it stands still. Works with any Lightning logger, `WandbLogger` included.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the recipe that this batch's meta iteration used; nothing where the module has none yet."""
        recipe: Any = getattr(pl_module, "hyperparameters", None)
        if recipe is None or not trainer.loggers or not trainer.is_global_zero:
            return
        nets: Any = pl_module.meta_nets
        metrics = {f"{kind}/{name}": value for kind, name, value in named_values(recipe, nets)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
