"""What a client process knows and does: its data, the global model, and Algorithm 1's client side."""

import contextlib
import copy
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import nn

from fedl2p.client import FedL2PClient, Limit, inner_batches, limited
from fedl2p.core.cohort import ClientTask, CohortRunner, Evaluation, MetaUpdate, automatic_cohort_size
from fedl2p.core.finetune import CompiledStep, EvaluationStatistics, RunningStart
from fedl2p.core.functional import Batch, FunctionalModel, LossFunction, Tensors
from fedl2p.core.hypergradients import HypergradientEstimator
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.meta_step import META_LR
from fedl2p.core.statistics import ClientStatistics, collect_statistics
from fedl2p.federation.checkpoint import load_statistics, save_statistics
from fedl2p.seeding import derive_seed

if TYPE_CHECKING:
    from fedl2p.datamodules.base.federated import FederatedDataModule


class ClientRuntime:
    """Runs clients of one federation on one global model; statistics are collected once a client and kept.

    Attributes:
        data: the clients' data.
        model: theta_g as a function.
        meta_nets: the structure of the nets, with the standardization of their inputs.
        runner: passes clients through the core in cohorts.
        automatic_sizes: the cohort sizes that were chosen, by samples in a training batch.
    """

    def __init__(
        self,
        data: "FederatedDataModule",
        model: nn.Module,
        meta_nets: MetaNets,
        *,
        estimator: HypergradientEstimator,
        meta_iterations: int = 3,
        finetune_epochs: int = 15,
        meta_lr: dict[str, float] | None = None,
        clip_value: float = 1.0,
        running_start: RunningStart = "measured",
        evaluation_statistics: EvaluationStatistics = "running",
        val_loss_fn: LossFunction | None = None,
        cohort_size: int | None = None,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        compile: bool = False,
        seed: int = 0,
        trainer: dict[str, Any] | None = None,
        statistics_folder: Path | None = None,
    ) -> None:
        """Sets the clients up.

        Args:
            data: the clients' data.
            model: theta_g, from `convert_batchnorm`.
            meta_nets: fitting `model`.
            estimator: of the hypergradient.
            meta_iterations: K.
            finetune_epochs: e.
            meta_lr: zeta by group, see `meta_optimizer`.
            clip_value: of the hypergradient.
            running_start: see `initial_running`.
            evaluation_statistics: of FedL2P's validation and testing, see `evaluation_loss`.
            val_loss_fn: L_V; None is the training loss.
            cohort_size: the most clients in one vmapped call; None follows `automatic_cohort_size`, 1 runs each client
                through `Trainer.fit`.
            device: where cohorts run.
            autocast: the half precision of cohorts' fine-tuning; None is none.
            compile: whether inner steps of single clients are compiled, see `CompiledStep`.
            seed: of the run; batch orders follow from it, the round and the client.
            trainer: arguments of the Lightning Trainer.
            statistics_folder: where clients' statistics outlast the process; None keeps them in memory only.
        """
        self.data = data
        self.device = torch.device(device)
        self.autocast = autocast
        self.model = FunctionalModel.of(model.requires_grad_(False).to(self.device), val_loss_fn=val_loss_fn)
        if compile:
            self.model = replace(self.model, compiled=CompiledStep())
        self.meta_nets = meta_nets.to(self.device)
        self.estimator = estimator
        self.meta_iterations = meta_iterations
        self.finetune_epochs = finetune_epochs
        self.meta_lr = dict(META_LR if meta_lr is None else meta_lr)
        self.clip_value = clip_value
        self.running_start: RunningStart = running_start
        self.evaluation_statistics: EvaluationStatistics = evaluation_statistics
        self.cohort_size = cohort_size
        self.seed = seed
        self.trainer_arguments = dict(trainer or {})
        self.statistics_folder = statistics_folder
        self.automatic_sizes: dict[int, int] = {}
        self._statistics: dict[int, ClientStatistics] = {}
        data.to(self.device)
        if self.device.type == "cpu" and self._automatic_size(data.batch_size) == 1:
            # Networks large enough to go one client at a time are faster so; small ones, stacked, are not.
            model.to(memory_format=torch.channels_last)
            self.model = replace(self.model, fused_batchnorm=True)
        self.runner = CohortRunner(self.model, running_start=running_start)

    @property
    def through_trainer(self) -> bool:
        """Whether each client learns as a `FedL2PClient` in a Trainer of its own instead of in a cohort."""
        return self.cohort_size == 1

    def statistics(self, client_id: int) -> ClientStatistics:
        """A client's statistics, collected at the first call."""
        if client_id not in self._statistics:
            kept = self.statistics_folder / f"{client_id}.safetensors" if self.statistics_folder else None
            if kept is not None and kept.exists():
                self._statistics[client_id] = load_statistics(kept, self.device)
            else:
                loader = self.data.client(client_id).statistics_dataloader()
                self._statistics[client_id] = collect_statistics(self.model.module, loader)
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    save_statistics(kept, self._statistics[client_id])
        return self._statistics[client_id]

    def lambda_(self) -> Tensors:
        """The nets' own parameters, detached copies by name."""
        return {name: p.detach().clone() for name, p in self.meta_nets.named_parameters()}

    def recipe(self, lambda_: Tensors, client_id: int) -> Hyperparameters:
        """What `lambda_` answers for a client (Eq. 4)."""
        statistics = self.statistics(client_id)
        with torch.no_grad():
            return torch.func.functional_call(self.meta_nets, lambda_, statistics.net_inputs())

    def meta_tasks(self, client_id: int, phase: str, round_number: int) -> list[ClientTask]:
        """The client's K meta iterations of a round: the same data in new orders that follow from the seed."""
        client = self.data.client(client_id, seed=derive_seed(self.seed, phase, round_number, client_id))
        loader = client.train_dataloader()
        val = self._batches(client.val_dataloader(), self._limit("val") or None)
        statistics = self.statistics(client_id)
        return [ClientTask(statistics, self._inner_batches(loader), val, []) for _ in range(self.meta_iterations)]

    def personal_task(self, client_id: int, parts: Sequence[str]) -> ClientTask:
        """The client's personalization, in one fixed order of batches, so that recipes are compared on equal terms.

        Args:
            client_id: whose.
            parts: which of `val` and `test` to bring.
        """
        client = self.data.client(client_id, seed=derive_seed(self.seed, "personalize", client_id))
        return ClientTask(
            self.statistics(client_id),
            self._inner_batches(client.train_dataloader()),
            self._batches(client.val_dataloader(), self._limit("val") or None) if "val" in parts else [],
            self._batches(client.test_dataloader(), self._limit("test")) if "test" in parts else [],
        )

    def _inner_batches(self, loader: Iterable[Batch]) -> list[Batch]:
        return self._on_device(inner_batches(loader, self.finetune_epochs, self._limit("train")))

    def _batches(self, loader: Iterable[Batch], limit: Limit) -> list[Batch]:
        return self._on_device(limited(loader, limit))

    def _on_device(self, batches: list[Batch]) -> list[Batch]:
        return [(x.to(self.device), y.to(self.device)) for x, y in batches]

    def _cohorts(self, client_ids: Sequence[int]) -> Iterator[list[int]]:
        """Positions of clients that go through the core together: of equal sizes, and not more than memory likes.

        Their batches are made when their turn comes, so memory does not grow with the number of clients.
        """
        by_size: dict[tuple[int, ...], list[int]] = {}
        for position, client_id in enumerate(client_ids):
            by_size.setdefault(self.data.client_sizes(client_id), []).append(position)
        for (num_samples, *_), positions in by_size.items():
            size = self.cohort_size or self._automatic_size(min(num_samples, self.data.batch_size))
            for start in range(0, len(positions), size):
                yield positions[start : start + size]

    def _automatic_size(self, batch_size: int) -> int:
        if batch_size not in self.automatic_sizes:
            inputs = torch.zeros((batch_size, *self.data.input_shape), device=self.device)
            steps = self.finetune_epochs  # at least; clients with more than one batch keep more
            self.automatic_sizes[batch_size] = automatic_cohort_size(
                self.model, inputs, history=self.estimator.history(steps)
            )
        return self.automatic_sizes[batch_size]

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def meta_update(
        self,
        lambdas: Sequence[Tensors],
        client_ids: Sequence[int],
        round_number: int,
        *,
        phase: str = "meta",
        meta_lr_scale: float = 1.0,
    ) -> list[MetaUpdate]:
        """Lines 6 to 11 of Algorithm 1 for several clients, each from its own lambda.

        Args:
            lambdas: one a client.
            client_ids: whose data.
            round_number: of which the batch orders follow.
            phase: another word gives other orders (L2P's, say).
            meta_lr_scale: multiplies the meta learning rates.

        Returns:
            One update a client, in order.
        """
        torch.manual_seed(derive_seed(self.seed, phase, round_number, *client_ids))
        meta_lr = {group: rate * meta_lr_scale for group, rate in self.meta_lr.items()}
        if self.through_trainer:
            return [
                self._fit(lambda_, client_id, derive_seed(self.seed, phase, round_number, client_id), meta_lr)
                for lambda_, client_id in zip(lambdas, client_ids, strict=True)
            ]
        updates: dict[int, MetaUpdate] = {}
        for positions in self._cohorts(client_ids):
            tasks = [self.meta_tasks(client_ids[i], phase, round_number) for i in positions]
            with self._precision():
                done = self.runner.meta_update(
                    self.meta_nets,
                    self.estimator,
                    [lambdas[i] for i in positions],
                    list(zip(*tasks, strict=True)),
                    meta_lr=meta_lr,
                    clip_value=self.clip_value,
                    statistics=self.evaluation_statistics,
                )
            updates |= dict(zip(positions, done, strict=True))
        return [updates[i] for i in range(len(client_ids))]

    def evaluate(
        self,
        recipes: Sequence[Hyperparameters],
        client_ids: Sequence[int],
        *,
        parts: Sequence[str] = ("val",),
        statistics: EvaluationStatistics | None = None,
        finetune: bool = True,
    ) -> list[dict[str, Evaluation]]:
        """Personalizes clients and measures them, see `CohortRunner.evaluate`; `statistics` None is FedL2P's."""
        statistics = statistics or self.evaluation_statistics
        torch.manual_seed(derive_seed(self.seed, "evaluate", *client_ids))
        results: dict[int, dict[str, Evaluation]] = {}
        for positions in self._cohorts(client_ids):
            tasks = [self.personal_task(client_ids[i], parts) for i in positions]
            chosen = [recipes[i] for i in positions]
            with self._precision():
                done = self.runner.evaluate(tasks, chosen, parts=parts, statistics=statistics, finetune=finetune)
            results |= dict(zip(positions, done, strict=True))
        return [results[i] for i in range(len(client_ids))]

    def _fit(self, lambda_: Tensors, client_id: int, seed: int, meta_lr: dict[str, float]) -> MetaUpdate:
        """One client as a LightningModule in a Trainer, which may move and cast the copies that it is given."""
        nets = copy.deepcopy(self.meta_nets)
        nets.load_state_dict(lambda_, strict=False)
        client = FedL2PClient(
            copy.deepcopy(self.model.module),
            num_classes=self.data.num_classes,
            meta_nets=nets,
            estimator=self.estimator,
            meta_iterations=self.meta_iterations,
            finetune_epochs=self.finetune_epochs,
            meta_lr=meta_lr,
            clip_value=self.clip_value,
            running_start=self.running_start,
            evaluation_statistics=self.evaluation_statistics,
            loss_fn=self.model.loss_fn,
            val_loss_fn=self.model.val_loss_fn,
            statistics=self.statistics(client_id),
            compiled=self.model.compiled,
        )
        data = self.data.client(client_id, seed=seed)
        quiet_trainer(self.trainer_arguments).fit(client, datamodule=data)
        after = {name: p.detach().to(lambda_[name]) for name, p in nets.named_parameters()}
        assert client.hyperparameters is not None
        recipe = Hyperparameters(*(t.detach().to(self.meta_nets.base_lr) for t in client.hyperparameters))
        return MetaUpdate(after, torch.tensor(client.val_losses), client.skipped_steps, recipe)

    def _limit(self, part: str) -> Limit:
        return self.trainer_arguments.get(f"limit_{part}_batches")


def quiet_trainer(arguments: dict[str, Any]) -> L.Trainer:
    """A Trainer for one client of many: no bar, no logger, no files, and no word about it on the terminal.

    Args:
        arguments: of the Trainer; they win over the quiet defaults.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*module\\(s\\) in eval mode.*")
    # Lightning's own use of a class that torch has deprecated.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", category=FutureWarning)
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        # L_V is part of the training step; Lightning's own validation would fine-tune once more.
        "check_val_every_n_epoch": sys.maxsize,
    }
    if arguments.get("devices", "auto") == "auto":
        arguments = arguments | {"devices": 1}  # many clients, each on one device
    return L.Trainer(**(defaults | arguments))
