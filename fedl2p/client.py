"""A client as a LightningModule: `Trainer.fit` learns the nets on its data, `Trainer.test` personalizes and tests.

Both are thin around the pure functions of `meta_step`, so the same numbers come out with a plain Trainer, inside a
Flower app, or in a cohort.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from fedl2p.core.batchnorm import MixedBatchNorm, convert_batchnorm
from fedl2p.core.distributed import common_seed, own_part
from fedl2p.core.finetune import (
    CompiledStep,
    EvaluationStatistics,
    InnerState,
    RunningStart,
    initial_running,
    trained_names,
)
from fedl2p.core.functional import Batch, FunctionalModel, LossFunction
from fedl2p.core.hypergradients import HypergradientEstimator, Unrolled
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.meta_step import (
    META_LR,
    ClientInputs,
    MetaStep,
    evaluate,
    meta_optimizer,
    meta_step,
    moved_names,
    personalize,
)
from fedl2p.core.statistics import ClientStatistics, collect_statistics
from fedl2p.errors import ConfigError, DataError

Recipe = Callable[[ClientStatistics], Hyperparameters]
Limit = int | float | None


def limited(loader: Iterable[Batch], limit: Limit = None) -> list[Batch]:
    """One pass over a loader, cut as Lightning's `limit_*_batches` cut it.

    Args:
        loader: of (inputs, targets).
        limit: None or 1.0 for all batches, an int for so many, a fraction below 1 for that part of them.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return list(loader)
    count = limit if isinstance(limit, int) else int(len(cast(Any, loader)) * limit)
    return list(islice(loader, count))


def inner_batches(loader: Iterable[Batch], epochs: int, limit: Limit = None) -> list[Batch]:
    """The batches of the inner loop, one a step: e passes over the training loader, which shuffles each time."""
    return [batch for _ in range(epochs) for batch in limited(loader, limit)]


class _UnlimitedEpochs(L.Callback):
    """K iterations may need several passes over the loader, so epochs must not end a fit.

    A callback, since Lightning tells a module nothing of an error.
    """

    def __init__(self) -> None:
        self._before: tuple[int | None] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # its mixin has it
            self._before = (trainer.fit_loop.max_epochs,)
            trainer.fit_loop.max_epochs = -1

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore(trainer)

    def _restore(self, trainer: L.Trainer) -> None:
        if self._before is not None:
            (trainer.fit_loop.max_epochs,), self._before = self._before, None


class FedL2PClient(L.LightningModule):
    """One client of Algorithm 1.

    `Trainer.fit(client, datamodule=...)` runs K meta iterations with manual optimization. A meta iteration is one
    training step of Lightning; the batches that the Trainer hands over only give the beat, since an iteration makes
    `finetune_epochs` passes of its own over the training data. `Trainer.test(client, datamodule=...)` (and `validate`)
    fine-tunes on the training data first and then measures.

    Any LightningDataModule with train and val (or test) loaders of (inputs, targets) will do. Where it has a
    `statistics_dataloader`, the training data without augmentation, statistics are collected from that.

    Attributes:
        model: theta_g, converted, frozen.
        meta_nets: lambda, what is trained.
        statistics: the client's, once they are collected.
        hyperparameters: the recipe last used.
        personalized: the fine-tuned state, after a test or validation.
        skipped_steps: meta iterations that were not finite and changed nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        meta_nets: MetaNets | None = None,
        base_lr: float = 1e-2,
        recipe: Recipe | None = None,
        estimator: HypergradientEstimator | None = None,
        meta_iterations: int = 3,
        finetune_epochs: int = 15,
        meta_lr: dict[str, float] | None = None,
        clip_value: float = 1.0,
        running_start: RunningStart = "measured",
        evaluation_statistics: EvaluationStatistics = "running",
        loss_fn: LossFunction = nn.functional.cross_entropy,
        val_loss_fn: LossFunction | None = None,
        statistics: ClientStatistics | None = None,
        compiled: CompiledStep | None = None,
    ) -> None:
        """Sets a client up.

        Args:
            model: theta_g: any module; batch norms are converted (in a copy) unless they already are.
            num_classes: of the classification task, for the accuracy.
            meta_nets: lambda to start from; None makes new nets that fit `model`.
            base_lr: initial eta~ of new nets.
            recipe: chooses the hyperparameters in testing; None asks the nets.
            estimator: of the hypergradient; None is `Unrolled()`, which descends (docs/hypergradients.md).
            meta_iterations: K, at least 1.
            finetune_epochs: e, at least 0.
            meta_lr: zeta for `bn_net`, `lr_net` and `base_lr`; None is `META_LR`.
            clip_value: the hypergradient is clipped to [-clip_value, clip_value] entry by entry.
            running_start: see `initial_running`.
            evaluation_statistics: what the validation and test losses are taken with: the client's `running`
                statistics, or those of the whole set as one `batch`.
            loss_fn: (outputs, targets) -> mean loss, what fine-tuning lowers.
            val_loss_fn: what the nets lower; None is `loss_fn`. See `expected_error`.
            statistics: of this client, if they were collected before.
            compiled: runs the inner steps; clients of equal shapes can have one together. None compiles nothing.

        Raises:
            ConfigError: a value outside those.
            ModelError: the model cannot be converted.
        """
        super().__init__()
        if meta_iterations < 1 or finetune_epochs < 0 or clip_value <= 0:
            raise ConfigError(
                f"meta_iterations is {meta_iterations}, finetune_epochs {finetune_epochs} and clip_value {clip_value}; "
                "allowed are at least 1, at least 0, and above 0."
            )
        if evaluation_statistics not in ("running", "batch"):
            raise ConfigError(f"evaluation_statistics is '{evaluation_statistics}'; allowed are 'running' and 'batch'.")
        self.automatic_optimization = False
        converted = any(isinstance(module, MixedBatchNorm) for module in model.modules())
        self.model = (model if converted else convert_batchnorm(model)).requires_grad_(False)
        self.meta_nets = meta_nets if meta_nets is not None else MetaNets(self.model, base_lr=base_lr)
        functional = FunctionalModel.of(self.model, loss_fn, val_loss_fn)
        self.functional = replace(functional, compiled=compiled, alone=True)
        self.recipe = recipe
        self.estimator = estimator if estimator is not None else Unrolled()
        self.meta_iterations = meta_iterations
        self.finetune_epochs = finetune_epochs
        self.meta_lr = dict(META_LR if meta_lr is None else meta_lr)
        self.clip_value = clip_value
        self.running_start = running_start
        self.evaluation_statistics: EvaluationStatistics = evaluation_statistics
        self.statistics = statistics
        self.hyperparameters: Hyperparameters | None = None
        self.personalized: InnerState | None = None
        self.skipped_steps = 0
        self.val_losses: list[float] = []
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{name}": metric
                for stage in ("val", "test")
                for name, metric in (("loss", MeanMetric()), ("acc", MulticlassAccuracy(num_classes, average="micro")))
            }
        )
        self._held: list[Batch] = []
        # One loader through a fit, so that each iteration shuffles anew.
        self._train_loader: Iterable[Batch] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD in three parameter groups, see `meta_optimizer`."""
        return meta_optimizer(dict(self.meta_nets.named_parameters()), self.meta_lr)

    def configure_callbacks(self) -> list[L.Callback]:
        """One that lets a fit last for K iterations."""
        return [_UnlimitedEpochs()]

    def setup(self, stage: str) -> None:
        """Prepares the training data too where Lightning asks for validation or testing only."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage in ("validate", "test") and datamodule is not None:
            datamodule.setup("fit")
        self._train_loader = None
        self.functional = replace(self.functional, group=self._processes())

    def _processes(self) -> Any:
        """Those that share this client's batches; None where there is one."""
        if self.trainer.world_size == 1:
            return None
        if not isinstance(self.trainer.strategy, DDPStrategy):
            raise ConfigError(
                f"The strategy is {type(self.trainer.strategy).__name__}; over several devices a client needs 'ddp'."
            )
        if getattr(self.trainer, "datamodule", None) is None:
            raise DataError(
                "Over several devices the client needs a DataModule (datamodule=...), since the Trainer has already "
                "divided the loaders that it was given."
            )
        return torch.distributed.group.WORLD

    def on_fit_start(self) -> None:
        """Starts to count."""
        self.val_losses, self.skipped_steps = [], 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One meta iteration: recipe, fine-tuning, hypergradient, step of the nets (lines 9 and 10 of Algorithm 1)."""
        optimizer = self.optimizers()
        parameters = dict(self.meta_nets.named_parameters())
        step = self.meta_gradient({name: p.detach() for name, p in parameters.items()})
        self.val_losses.append(float(step.val_loss))
        self.hyperparameters = step.hyperparameters
        if bool(step.finite):
            # Lightning takes the factor of half precision off again before it steps.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            for name, parameter in parameters.items():
                gradient = step.gradients[name]
                parameter.grad = gradient if scaler is None else scaler.scale(gradient)
            cast(torch.optim.Optimizer, optimizer).step()
        else:
            self.skipped_steps += 1
        self.log("meta_val_loss", step.val_loss, prog_bar=True, batch_size=1)
        self.log("skipped_steps", float(self.skipped_steps), batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends the fit after K iterations."""
        if len(self.val_losses) >= self.meta_iterations:
            self.trainer.should_stop = True

    def meta_gradient(self, lambda_: dict[str, Tensor]) -> MetaStep:
        """The hypergradient of `lambda_` on this client's data, see `meta_step`."""
        statistics = self._collect()
        if self._train_loader is None:
            self._train_loader = self._loader("train")
        client = ClientInputs(
            net_inputs=cast(Any, tuple(t.to(self.meta_nets.base_lr) for t in statistics.net_inputs())),
            running=self._running(statistics),
            train_batches=self._train_batches(self._train_loader),
            val_batches=self._val_batches(),
        )
        origin = InnerState(*self.functional.tensors())
        return meta_step(
            self.functional,
            self.meta_nets,
            self.estimator,
            origin,
            lambda_,
            client,
            clip_value=self.clip_value,
            statistics=self.evaluation_statistics,
            trained=moved_names(self.functional, self.meta_nets, lambda_, client.net_inputs),
        )

    def personalize(self) -> InnerState:
        """Statistics, hyperparameters, fine-tuning: the personalized state, which testing then uses."""
        statistics = self._collect()
        chosen = self.meta_nets.recipe(statistics) if self.recipe is None else self.recipe(statistics)
        parameters, buffers = self.functional.tensors()
        start = InnerState(parameters, {**buffers, **self._running(statistics)})
        trained = trained_names(self.functional, chosen.eta)
        self.hyperparameters = chosen
        batches = self._train_batches(self._loader("train"))
        self.personalized = personalize(self.functional, start, batches, chosen, trained).final
        return self.personalized

    def on_validation_epoch_start(self) -> None:
        """Personalizes first."""
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        """Personalizes first."""
        self._start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures the personalized model on a validation batch."""
        self._measure([batch], "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures the personalized model on a test batch."""
        self._measure([batch], "test")

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
        if self.evaluation_statistics == "batch" and not whole_set:
            self._held += batches
            return
        if self.personalized is None:
            return
        assert self.hyperparameters is not None
        outputs, loss, _ = evaluate(
            self.functional,
            self.personalized,
            self.hyperparameters.beta,
            batches,
            statistics=self.evaluation_statistics,
        )
        targets = torch.cat([y for _, y in batches])
        values: dict[str, tuple[Any, ...]] = {"loss": (loss, len(targets)), "acc": (outputs, targets)}
        for name, arguments in values.items():
            metric = cast(Metric, self.metrics[f"{stage}_{name}"])
            metric.update(*arguments)
            self.log(f"{stage}_{name}", metric, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets))

    def _measure_held(self, stage: str) -> None:
        if self._held:
            held, self._held = self._held, []
            self._measure(held, stage, whole_set=True)

    def _collect(self) -> ClientStatistics:
        if self.statistics is None:
            datamodule = getattr(self.trainer, "datamodule", None)
            loader = getattr(datamodule, "statistics_dataloader", None)
            data = loader() if loader is not None else self._loader("train")
            self.statistics = collect_statistics(self.model, self._to_device(list(data)))
        return self.statistics

    def _running(self, statistics: ClientStatistics) -> dict[str, Tensor]:
        return initial_running(self.functional, self.functional.tensors()[1], statistics, start=self.running_start)

    def _train_batches(self, loader: Iterable[Batch]) -> list[Batch]:
        with self._equal_order():
            batches = inner_batches(loader, self.finetune_epochs, self.trainer.limit_train_batches)
        return self._to_device(self._own(batches))

    def _val_batches(self) -> list[Batch]:
        return self._to_device(self._own(limited(self._loader("val"), self.trainer.limit_val_batches or None)))

    @contextlib.contextmanager
    def _equal_order(self) -> Iterator[None]:
        """Lets a loader that shuffles by torch's generator give one order in all processes."""
        if self.functional.group is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(common_seed(self.functional.group))
            yield

    def _own(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """This process's part of each batch."""
        group = self.functional.group
        return batches if group is None else [own_part(cast(Batch, tuple(batch)), group) for batch in batches]

    def _loader(self, kind: str) -> Iterable[Batch]:
        """A fresh loader of the DataModule, since the Trainer may be in the middle of its own."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            return getattr(datamodule, f"{kind}_dataloader")()
        if kind == "val" and self.trainer.val_dataloaders is None:
            with contextlib.suppress(MisconfigurationException):  # there are none, which is said below
                self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
        given = self.trainer.train_dataloader if kind == "train" else self.trainer.val_dataloaders
        if given is None:
            raise DataError(
                f"The client needs its {kind} data, but the Trainer has no loader for them; pass a DataModule "
                "(datamodule=...) with train_dataloader and val_dataloader."
            )
        return given

    def _to_device(self, batches: Iterable[Batch]) -> list[Batch]:
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin
        return [cast(Batch, tuple(precision.convert_input(strategy.batch_to_device(list(b))))) for b in batches]
