"""A client as a LightningModule: `Trainer.fit` learns the nets on its data, `Trainer.test` personalizes and tests.

Thin around the `Learner`, which a federation uses too, so the same numbers come out with a plain Trainer, inside a
Flower app, or in a cohort.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from fedl2p.core.batchnorm import MixedBatchNorm, convert_batchnorm
from fedl2p.core.episode import Episode, make_episode
from fedl2p.core.finetune import evaluate, predict
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, LossFunction, batch_size
from fedl2p.core.hypergradients import HypergradientEstimator
from fedl2p.core.learner import Learner
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.meta_step import MetaStep, meta_optimizer
from fedl2p.core.settings import BatchNormMode, LearnerSettings
from fedl2p.core.sharded import ShardedModel
from fedl2p.core.statistics import ClientStatistics, collect_statistics
from fedl2p.trainer_data import TrainerData

Recipe = Callable[[ClientStatistics], Hyperparameters]
"""Chooses a client's hyperparameters from its statistics."""


class FedL2PClient(L.LightningModule):
    """One client of Algorithm 1, for any Trainer and any DataModule or loaders.

    `Trainer.fit(client, datamodule=...)` runs K meta iterations (`meta_iterations`) with manual optimization, whatever
    `max_epochs` is; a fit that goes on from a checkpoint (`ckpt_path`) runs those that are left. A meta iteration
    is one training step of Lightning on one `Episode`. Loaders that give ordinary batches (inputs, targets) only give
    the beat: the client makes the episode itself, by `finetune_epochs` passes over the training loader and one over the
    validation loader. Loaders of episodes are taken as they are; one of a cohort (`fedl2p.core.cohort.stack`) gives
    the nets the mean of its clients' gradients.

    `Trainer.test` (and `validate` and `predict`) fine-tunes on the training data first, then measures or predicts. It
    needs the training data: a DataModule, or the loaders of a fit before.

    Inputs are a tensor, a tuple of tensors or a dict of them (a Hugging Face batch, say). Where a DataModule has a
    `statistics_dataloader`, the training data without augmentation, statistics are collected from that.

    Over several devices (`Trainer(devices=2, strategy="ddp")`) the processes share each batch. They must then see the
    same batches in the same order: pass a DataModule whose loaders shuffle by torch's generator, if at all; the client
    seeds it alike everywhere. Set `use_distributed_sampler=False`, so that the Trainer does not divide test data too.

    Attributes:
        model: theta_g, converted, frozen.
        meta_nets: lambda, what is trained.
        learner: what computes.
        settings: how the client learns.
        statistics: the client's, once they are collected.
        hyperparameters: the recipe last used.
        personalized: the fine-tuned state, after a test, validation or prediction.
        val_losses: the validation loss of each meta iteration.
        skipped_steps: meta iterations that were not finite and changed nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int | None = None,
        settings: LearnerSettings | None = None,
        meta_nets: MetaNets | None = None,
        base_lr: float = 1e-2,
        recipe: Recipe | None = None,
        estimator: HypergradientEstimator | None = None,
        loss_fn: LossFunction = nn.functional.cross_entropy,
        val_loss_fn: LossFunction | None = None,
        metrics: Mapping[str, Metric] | None = None,
        statistics: ClientStatistics | None = None,
        compile: bool = False,
        **options: Any,
    ) -> None:
        """Sets a client up.

        Args:
            model: theta_g: any module; batch norms are converted (in a copy) unless they already are.
            num_classes: of a classification task, whose accuracy is then measured (`val_acc`, `test_acc`).
            settings: how the client learns; None is `LearnerSettings()`.
            meta_nets: lambda to start from; None makes new nets that fit `model`.
            base_lr: initial learning rate of every tensor (eta~) in new nets.
            recipe: chooses the hyperparameters in testing; None asks the nets.
            estimator: of the hypergradient; None is `Unrolled()`, which descends (docs/hypergradients.md).
            loss_fn: (outputs, targets) -> mean loss over the samples, what fine-tuning lowers.
            val_loss_fn: likewise, what the nets lower; None is `loss_fn`. See `expected_error`.
            metrics: more metrics by name, updated with (outputs, targets), logged as `val_<name>` and `test_<name>`.
            statistics: of this client, if they were collected before.
            compile: whether inner steps are compiled, see `CompiledSteps`.
            **options: single settings by name (`finetune_epochs=5`), which win over `settings`.

        Raises:
            ConfigError: an unknown or impossible setting.
            ModelError: the model cannot be converted.
        """
        super().__init__()
        settings = LearnerSettings.of(**((settings or LearnerSettings()).as_dict() | options))
        self.save_hyperparameters({"num_classes": num_classes, "base_lr": base_lr, **settings.as_dict()})
        self.automatic_optimization = False
        converted = any(isinstance(module, MixedBatchNorm) for module in model.modules())
        self.model = (model if converted else convert_batchnorm(model)).requires_grad_(False)
        self.meta_nets = meta_nets if meta_nets is not None else MetaNets(self.model, base_lr=base_lr)
        functional = FunctionalModel.of(self.model, loss_fn, val_loss_fn)
        self.learner = Learner(functional, self.meta_nets, estimator=estimator, settings=settings, compile=compile)
        self.settings = settings
        self.recipe = recipe
        self.statistics = statistics
        self.hyperparameters: Hyperparameters | None = None
        self.personalized: InnerState | None = None
        self.val_losses: list[float] = []
        self.skipped_steps = 0
        self.metrics = _stage_metrics(dict(metrics or {}), num_classes)
        self._held: list[Batch] = []
        self._data = TrainerData()
        self._resumed = self._fitted = False

    def forward(self, inputs: Any) -> Any:
        """The outputs of the personalized model in evaluation mode; of the global model where there is none yet.

        Args:
            inputs: a batch's, as the model takes them.
        """
        model = self.learner.model
        if self.personalized is None or self.hyperparameters is None:
            beta = self.meta_nets.base_lr.new_zeros(len(model.batchnorm_names))
            return predict(model, InnerState(*model.tensors()), beta, inputs)
        mode = self.settings.evaluation_statistics
        return predict(model, self.personalized, self.hyperparameters.beta, inputs, bn_mode=mode)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD in three parameter groups, see `meta_optimizer`."""
        return meta_optimizer(dict(self.meta_nets.named_parameters()), self.settings.meta_lr)

    def configure_callbacks(self) -> list[L.Callback]:
        """One that lets a fit last for K iterations."""
        return [_MetaIterations()]

    def setup(self, stage: str) -> None:
        """Prepares the data, and the processes that share them."""
        self._data.start(self.trainer, stage)
        model = FunctionalModel.of(self.model, self.learner.model.loss_fn, self.learner.model.val_loss_fn)
        group = self._data.group
        self.learner.model = model if group is None else ShardedModel.sharing(model, group)

    # Learning

    def on_fit_start(self) -> None:
        """Starts to count, unless the fit goes on from a checkpoint."""
        if not self._resumed:
            self.val_losses, self.skipped_steps = [], 0
        self._resumed = False

    def on_train_start(self) -> None:
        """Keeps the loaders, so that a test after this fit needs no others."""
        self._data.remember(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One meta iteration: recipe, fine-tuning, hypergradient, step of the nets (lines 9 and 10 of Algorithm 1)."""
        episode = batch if isinstance(batch, Episode) else self._make_episode()
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        parameters = dict(self.meta_nets.named_parameters())
        step = self._meta_step({name: p.detach() for name, p in parameters.items()}, episode)
        self.val_losses.append(float(step.val_loss))
        self.hyperparameters = step.hyperparameters
        if bool(step.finite):
            # Lightning takes the factor of half precision off again before it steps.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            for name, parameter in parameters.items():
                gradient = step.gradients[name]
                parameter.grad = gradient if scaler is None else scaler.scale(gradient)
            optimizer.step()
        else:
            self.skipped_steps += 1
        self.log("meta_val_loss", step.val_loss, prog_bar=True, batch_size=1)
        self.log("skipped_steps", float(self.skipped_steps), batch_size=1)
        self.log("step", float(len(self.val_losses)), batch_size=1)  # loggers count iterations, skipped ones too

    def _meta_step(self, lambda_: dict[str, Tensor], episode: Episode) -> MetaStep:
        """A client's meta iteration; of a cohort, the mean over those of its clients that are finite."""
        self._fit_learner(episode)
        clients = episode.cohort_size
        if clients is None:
            return self.learner.meta_step(lambda_, episode)
        stacked = {name: tensor.expand(clients, *tensor.shape) for name, tensor in lambda_.items()}
        each = self.learner.meta_step(stacked, episode)
        count = each.finite.sum().clamp(min=1)
        return MetaStep(
            gradients={name: gradient.sum(0) / count for name, gradient in each.gradients.items()},
            val_loss=each.val_loss[each.finite].mean() if each.finite.any() else each.val_loss.mean(),
            finite=each.finite.any(),
            hyperparameters=Hyperparameters(*(tensor.mean(0) for tensor in each.hyperparameters)),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds how far the fit has come."""
        checkpoint["meta_iterations"] = {"val_losses": list(self.val_losses), "skipped_steps": self.skipped_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on where the checkpoint's fit stood."""
        done = checkpoint.get("meta_iterations", {"val_losses": [], "skipped_steps": 0})
        self.val_losses, self.skipped_steps = list(done["val_losses"]), done["skipped_steps"]
        self._resumed = True

    # Personalization

    def personalize(self) -> InnerState:
        """Statistics, hyperparameters, fine-tuning: the personalized state, which testing and `forward` then use."""
        episode = self._make_episode(val=False, fresh=True)
        statistics = self._collect()
        self.hyperparameters = self.meta_nets.recipe(statistics) if self.recipe is None else self.recipe(statistics)
        self._fit_learner(episode)
        self.personalized = self.learner.personalize(episode, self.hyperparameters)
        return self.personalized

    def on_validation_epoch_start(self) -> None:
        """Personalizes first."""
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        """Personalizes first."""
        self._start_evaluation()

    def on_predict_epoch_start(self) -> None:
        """Personalizes first, unless that was done."""
        if self.personalized is None:
            self._start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures the personalized model on a validation batch."""
        self._measure([batch], "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures the personalized model on a test batch."""
        self._measure([batch], "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The personalized model's outputs for a batch: inputs with targets, or inputs alone."""
        return self(batch[0] if isinstance(batch, tuple | list) else batch)

    def on_validation_epoch_end(self) -> None:
        """Measures what had to wait for the whole set."""
        self._measure_held("val")

    def on_test_epoch_end(self) -> None:
        """Measures what had to wait for the whole set."""
        self._measure_held("test")

    def _start_evaluation(self) -> None:
        self._held = []
        # Lightning's check before a fit wants to know that the steps run, which costs no fine-tuning.
        self.personalized = None
        if not self.trainer.sanity_checking:
            self.personalize()

    def _measure(self, batches: list[Batch], stage: str, *, whole_set: bool = False) -> None:
        mode = self.settings.evaluation_statistics
        if mode is BatchNormMode.batch and not whole_set:
            self._held += batches
            return
        if self.personalized is None or self.hyperparameters is None:
            return
        beta = self.hyperparameters.beta
        outputs, loss, _ = evaluate(self.learner.model, self.personalized, beta, batches, bn_mode=mode)
        targets = torch.cat([y for _, y in batches]) if len(batches) > 1 else batches[0][1]
        count = batch_size(targets)
        for name, metric in self.metrics.items():
            if name.startswith(stage):
                measured = cast(Metric, metric)
                measured.update(*((loss, count) if name == f"{stage}_loss" else (outputs, targets)))
                self.log(name, measured, on_step=False, on_epoch=True, prog_bar=True, batch_size=count)

    def _measure_held(self, stage: str) -> None:
        if self._held:
            held, self._held = self._held, []
            self._measure(held, stage, whole_set=True)

    def _make_episode(self, *, val: bool = True, fresh: bool = False) -> Episode:
        """From the Trainer's data; `val`: with the validation data, `fresh`: see `TrainerData.train`."""
        statistics = self._collect()
        train = self._data.train(self.trainer, self.settings.finetune_epochs, fresh=fresh)
        val_batches = self._data.val(self.trainer) if val else []
        start = self.settings.running_start
        episode = make_episode(self.learner.model, statistics, train, val_batches, running_start=start)
        xi, moments, count = (tensor.to(self.meta_nets.base_lr) for tensor in episode.net_inputs)
        return episode._replace(net_inputs=(xi, moments, count))

    def _collect(self) -> ClientStatistics:
        if self.statistics is None:
            self.statistics = collect_statistics(self.model, self._data.statistics(self.trainer))
        return self.statistics

    def _fit_learner(self, episode: Episode) -> None:
        """Takes theta_g from where the Trainer has moved it, and once the kernels that suit the size of the batches."""
        self.learner.origin = InnerState(*self.learner.model.tensors())
        if not self._fitted and episode.cohort_size is None and self._data.group is None and episode.train_batches:
            self.learner.fit_to(episode.train_batches[0][0])
            self._fitted = True


def _stage_metrics(metrics: dict[str, Metric], num_classes: int | None) -> nn.ModuleDict:
    """Loss, accuracy and the user's metrics, for validation and for test."""
    if num_classes is not None:
        metrics.setdefault("acc", MulticlassAccuracy(num_classes, average="micro"))
    metrics = {"loss": MeanMetric(), **metrics}
    return nn.ModuleDict({f"{stage}_{name}": m.clone() for stage in ("val", "test") for name, m in metrics.items()})


class _MetaIterations(L.Callback):
    """Lets a fit last for K meta iterations, however many epochs of the training loader these are.

    A callback, since Lightning tells a module nothing of an error.
    """

    def __init__(self) -> None:
        self._before: tuple[int | None] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # its mixin has it
            self._before = (trainer.fit_loop.max_epochs,)
            trainer.fit_loop.max_epochs = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts the epochs that K iterations are, so that bars show an end."""
        client = cast(FedL2PClient, pl_module)
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
        if self._before[0] not in (None, -1, 1, 1000, trainer.fit_loop.max_epochs):
            rank_zero_info(f"max_epochs={self._before[0]} is not used: a fit lasts for meta_iterations={iterations}.")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        client = cast(FedL2PClient, pl_module)
        if len(client.val_losses) >= client.settings.meta_iterations:
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore(trainer)

    def _restore(self, trainer: L.Trainer) -> None:
        if self._before is not None:
            (trainer.fit_loop.max_epochs,), self._before = self._before, None
