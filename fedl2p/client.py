"""A client as a LightningModule: `Trainer.fit` learns the nets on its data, `Trainer.test` personalizes and tests.

Thin around the `Learner`, which a federation uses too, so the same numbers come out with a plain Trainer, inside a
Flower app, or in a cohort.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from fedl2p.core.batchnorm import MixedBatchNorm, convert_batchnorm
from fedl2p.core.episode import Episode, make_episode
from fedl2p.core.finetune import evaluate, predict
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, LossFunction, batch_size, concatenate
from fedl2p.core.hypergradients import HypergradientEstimator
from fedl2p.core.learner import Learner
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.meta_step import MetaStep, meta_optimizer
from fedl2p.core.settings import BatchNormMode, LearnerSettings
from fedl2p.core.sharded import ShardedModel
from fedl2p.core.statistics import ClientStatistics, collect_statistics
from fedl2p.errors import ConfigError, ModelError
from fedl2p.meta_iterations import MetaIterations
from fedl2p.policy.files import policy_metadata
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
    needs the training data: a DataModule, or the data of the run before. Several loaders of one kind count as one set.
    Statistics are collected again where the data come from another DataModule or other loaders.

    Inputs are a tensor, a tuple of tensors or a dict of them (a Hugging Face batch, say). Where a DataModule has a
    `statistics_dataloader`, the training data without augmentation, statistics are collected from that.

    Over several devices (`Trainer(devices=2, strategy="ddp")`) the processes share each batch. They must then see the
    same batches in the same order: pass a DataModule whose loaders shuffle by torch's generator, if at all; the client
    seeds it alike everywhere. Set `use_distributed_sampler=False`, so that the Trainer does not divide test data too.

    Attributes:
        model: theta_g, converted, frozen; the client's own copy.
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
            model: theta_g: any module, which is copied; batch norms are converted unless they already are.
            num_classes: of a classification task, whose accuracy is then measured (`val_acc`, `test_acc`).
            settings: how the client learns; None is `LearnerSettings()`.
            meta_nets: lambda to start from; None makes new nets that fit `model`.
            base_lr: initial learning rate of every tensor (eta~) in new nets.
            recipe: chooses the hyperparameters in testing; None asks the nets.
            estimator: of the hypergradient; None is `Unrolled()`, the exact derivative (docs/hypergradients.md).
            loss_fn: (outputs, targets) -> mean loss over the samples, what fine-tuning lowers.
            val_loss_fn: likewise, what the nets lower; None is `loss_fn`. See `expected_error`.
            metrics: more metrics by name, updated with (outputs, targets), logged as `val_<name>` and `test_<name>`.
            statistics: of this client, if they were collected before; no others are then collected.
            compile: whether inner steps are compiled, see `CompiledSteps`.
            **options: single settings by name (`finetune_epochs=5`), which win over `settings`.

        Raises:
            ConfigError: an unknown or impossible setting, or a metric that is named `loss`.
            ModelError: the model cannot be converted.
        """
        super().__init__()
        settings = LearnerSettings.of(**((settings or LearnerSettings()).as_dict() | options))
        self.save_hyperparameters({"num_classes": num_classes, "base_lr": base_lr, **settings.as_dict()})
        self.automatic_optimization = False
        converted = any(isinstance(module, MixedBatchNorm) for module in model.modules())
        self.model = (copy.deepcopy(model) if converted else convert_batchnorm(model)).requires_grad_(False)
        self.meta_nets = meta_nets if meta_nets is not None else MetaNets(self.model, base_lr=base_lr)
        functional = FunctionalModel.of(self.model, loss_fn, val_loss_fn)
        self.learner = Learner(functional, self.meta_nets, estimator=estimator, settings=settings, compile=compile)
        self.settings = settings
        self.recipe = recipe
        self.statistics = statistics
        self._statistics_given = statistics is not None
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
        """One that lets a fit last for K iterations, unless a fit before has left it in the Trainer."""
        there = any(isinstance(callback, MetaIterations) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]  # its mixin has it
        return [] if there else [MetaIterations()]

    def setup(self, stage: str) -> None:
        """Prepares the data, and the processes that share them."""
        if self._data.start(self.trainer, stage):
            self._forget_data()
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
        """Takes the loaders, which a test after this fit can use too."""
        if self._data.start_fit(self.trainer):
            self._forget_data()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One meta iteration: recipe, fine-tuning, hypergradient, step of the nets (lines 9 and 10 of Algorithm 1)."""
        episode = batch if isinstance(batch, Episode) else self._make_episode()
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        parameters = dict(self.meta_nets.named_parameters())
        step = self._meta_step({name: p.detach() for name, p in parameters.items()}, episode)
        self.val_losses.append(float(step.val_loss))
        self.hyperparameters = step.hyperparameters
        self.personalized = None  # by a recipe that the nets no longer give
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
        """Adds how far the fit has come, and how the nets are built."""
        checkpoint["meta_nets"] = policy_metadata(self.meta_nets)
        checkpoint["meta_iterations"] = {"val_losses": list(self.val_losses), "skipped_steps": self.skipped_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on where the checkpoint's fit stood, if this is a fit.

        Raises:
            ModelError: the checkpoint's nets are for another model, or read other inputs.
        """
        own = policy_metadata(self.meta_nets)
        different = [key for key, value in checkpoint.get("meta_nets", {}).items() if own.get(key) != value]
        if different:
            raise ModelError(
                f"The checkpoint's nets differ from the client's in {', '.join(different)}; pass the model that they "
                "are for, and meta_nets=MetaNets(...) with the options that they were built with."
            )
        done = checkpoint.get("meta_iterations", {"val_losses": [], "skipped_steps": 0})
        self.val_losses, self.skipped_steps = list(done["val_losses"]), done["skipped_steps"]
        self._resumed = self._trainer is not None and self.trainer.state.fn == "fit"
        self._forget_data()  # as another theta_g and other nets saw them

    # Personalization

    def personalize(self) -> InnerState:
        """Statistics, hyperparameters, fine-tuning: the personalized state, which testing and `forward` then use."""
        with self._as_in_a_training_step():
            episode = self._make_episode(val=False, fresh=True)
            statistics = self._collect()
            self.hyperparameters = self.meta_nets.recipe(statistics) if self.recipe is None else self.recipe(statistics)
            self._fit_learner(episode)
            self.personalized = self.learner.personalize(episode, self.hyperparameters)
        return self.personalized

    @contextmanager
    def _as_in_a_training_step(self) -> Iterator[None]:
        """In the Trainer's precision; and outside of inference mode, whose tensors no later gradient could use."""
        with torch.inference_mode(False), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            yield

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

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures the personalized model on a validation batch."""
        self._measure(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures the personalized model on a test batch."""
        self._measure(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The personalized model's outputs for a batch: inputs with targets, or inputs alone."""
        return self(batch[0] if isinstance(batch, tuple | list) else batch)

    def on_validation_epoch_end(self) -> None:
        """Logs what was measured."""
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Logs what was measured."""
        self._end_evaluation("test")

    def _start_evaluation(self) -> None:
        self._held = []
        with torch.inference_mode(False):  # what inference mode has made, a validation in a fit cannot count on
            for metric in self.metrics.values():
                cast(Metric, metric).reset()
        # Lightning's check before a fit wants to know that the steps run, which costs no fine-tuning.
        self.personalized = None
        if not self.trainer.sanity_checking:
            self.personalize()

    def _measure(self, batch: Batch, stage: str) -> None:
        if self.settings.evaluation_statistics is BatchNormMode.batch:
            self._held.append(batch)  # statistics are those of the whole set
        else:
            self._update_metrics([batch], stage)

    def _update_metrics(self, batches: list[Batch], stage: str) -> None:
        if self.personalized is None or self.hyperparameters is None:
            return
        mode, beta = self.settings.evaluation_statistics, self.hyperparameters.beta
        outputs, loss, _ = evaluate(self.learner.model, self.personalized, beta, batches, bn_mode=mode)
        targets = concatenate([targets for _, targets in batches])
        for name, metric in self._metrics(stage).items():
            metric.update(*((loss, batch_size(targets)) if name == f"{stage}_loss" else (outputs, targets)))

    def _end_evaluation(self, stage: str) -> None:
        held, self._held = self._held, []
        if held:
            with self.trainer.precision_plugin.forward_context():
                self._update_metrics(held, stage)
        for name, metric in self._metrics(stage).items():
            if metric.update_called:
                self.log(name, metric, prog_bar=True)

    def _metrics(self, stage: str) -> dict[str, Metric]:
        return {name: cast(Metric, m) for name, m in self.metrics.items() if name.startswith(f"{stage}_")}

    def _make_episode(self, *, val: bool = True, fresh: bool = False) -> Episode:
        """From the Trainer's data; `val`: with the validation data, `fresh`: see `TrainerData.train`."""
        statistics = self._collect()
        train = self._data.train(self.trainer, self.settings.finetune_epochs, fresh=fresh)
        val_batches = self._data.val(self.trainer) if val else []
        start = self.settings.running_start
        episode = make_episode(self.learner.model, statistics, train, val_batches, running_start=start)
        xi, moments, count = (tensor.to(self.meta_nets.base_lr) for tensor in episode.net_inputs)
        return episode._replace(net_inputs=(xi, moments, count))

    def _forget_data(self) -> None:
        """Lets go of what was measured on other data than those at hand."""
        self.personalized = None
        if not self._statistics_given:
            self.statistics = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FedL2PClient":
        """Moves or casts the personalized state with the module."""
        super()._apply(fn, recurse)
        self.personalized, self.hyperparameters = pytree.tree_map_only(
            Tensor, fn, (self.personalized, self.hyperparameters)
        )
        return self

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
    if "loss" in metrics:
        raise ConfigError("A metric is named 'loss', which the client measures by itself; give it another name.")
    if num_classes is not None:
        metrics.setdefault("acc", MulticlassAccuracy(num_classes, average="micro"))
    metrics = {"loss": MeanMetric(), **metrics}
    return nn.ModuleDict({f"{stage}_{name}": m.clone() for stage in ("val", "test") for name, m in metrics.items()})
