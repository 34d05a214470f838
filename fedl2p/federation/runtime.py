"""What a client process knows and does: its data, the global model, and Algorithm 1's client side."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from fedl2p.client import FedL2PClient
from fedl2p.core.episode import Episode, Limit, gather_batches, make_episode
from fedl2p.core.finetune import to_model
from fedl2p.core.functional import Batch, FunctionalModel, LossFunction, Tensors
from fedl2p.core.hypergradients import HypergradientEstimator
from fedl2p.core.learner import Evaluation, Learner, MetaUpdate
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.refinement import Refined
from fedl2p.core.settings import BatchNormMode, LearnerSettings, RefinementSettings
from fedl2p.core.statistics import ClientStatistics, collect_statistics
from fedl2p.federation.checkpoint import load_statistics, save_statistics
from fedl2p.seeding import derive_seed

if TYPE_CHECKING:
    from fedl2p.datamodules.base.federated import FederatedDataModule

View = Callable[[Episode], Episode]
"""Another look at a client's data: other samples to validate on, say."""


def as_it_is(episode: Episode) -> Episode:
    """The view that changes nothing."""
    return episode


class ClientRuntime:
    """Runs clients of one federation on one global model; statistics are collected once a client and kept.

    Attributes:
        data: the clients' data.
        model: theta_g as a function.
        meta_nets: the structure of the nets, with the standardization of their inputs.
        learner: what computes, for single clients and for cohorts.
        settings: how a client learns.
        automatic_sizes: the cohort sizes that were chosen, by samples in a training batch.
    """

    def __init__(
        self,
        data: "FederatedDataModule",
        model: nn.Module,
        meta_nets: MetaNets,
        *,
        estimator: HypergradientEstimator | None = None,
        settings: LearnerSettings | None = None,
        val_loss_fn: LossFunction | None = None,
        cohort_size: int | None = None,
        fabric: Fabric | None = None,
        compile: bool = False,
        seed: int = 0,
        limits: Mapping[str, Limit] | None = None,
        trainer: dict[str, Any] | None = None,
        statistics_folder: Path | None = None,
    ) -> None:
        """Sets the clients up.

        Args:
            data: the clients' data.
            model: theta_g, from `convert_batchnorm`.
            meta_nets: BNNet and LRNet, made for `model`.
            estimator: of the hypergradient; None is `Unrolled()`.
            settings: how a client learns; None is `LearnerSettings()`.
            val_loss_fn: what the nets lower; None is the training loss.
            cohort_size: the most clients that are stacked; None follows `automatic_cohort_size`.
            fabric: the device and the precision; None is the CPU in float32.
            compile: whether inner steps of single clients are compiled, see `CompiledSteps`.
            seed: of the run; batch orders follow from it, the round and the client.
            limits: the part of the `train`, `val` and `test` batches that is used, as Lightning's `limit_*_batches`.
            trainer: arguments of a Lightning Trainer through which each client learns by itself; None is none.
            statistics_folder: where clients' statistics outlast the process; None keeps them in memory only.
        """
        self.data = data
        self.fabric = fabric if fabric is not None else Fabric(accelerator="cpu", devices=1)
        self.device = self.fabric.device
        self.settings = settings if settings is not None else LearnerSettings()
        self.meta_nets = meta_nets.to(self.device)
        functional = FunctionalModel.of(model.requires_grad_(False).to(self.device), val_loss_fn=val_loss_fn)
        self.learner = Learner(functional, meta_nets, estimator=estimator, settings=self.settings, compile=compile)
        self.cohort_size = cohort_size
        self.seed = seed
        self.limits = dict(limits or {})
        self.trainer_arguments = trainer
        self.statistics_folder = statistics_folder
        self.automatic_sizes: dict[int, int] = {}
        self._statistics: dict[int, ClientStatistics] = {}
        data.to(self.device)
        self.learner.fit_to(self._zeros(data.batch_size))

    @property
    def model(self) -> FunctionalModel:
        """theta_g as a function."""
        return self.learner.model

    def statistics(self, client_id: int) -> ClientStatistics:
        """A client's statistics, collected at the first call."""
        if client_id not in self._statistics:
            kept = self.statistics_folder / f"{client_id}.safetensors" if self.statistics_folder else None
            if kept is not None and kept.exists():
                self._statistics[client_id] = load_statistics(kept, self.device)
            else:
                loader = self.data.client(client_id).statistics_dataloader()
                batches = (to_model([batch], self.model.module)[0] for batch in loader)
                self._statistics[client_id] = collect_statistics(self.model.module, batches)
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    save_statistics(kept, self._statistics[client_id])
        return self._statistics[client_id]

    def lambda_(self) -> Tensors:
        """The nets' own parameters, detached copies by name."""
        return self.learner.lambda_()

    def recipe(self, lambda_: Tensors, client_id: int) -> Hyperparameters:
        """What `lambda_` answers for a client (Eq. 4)."""
        return self.learner.recipe(lambda_, self.statistics(client_id).net_inputs())

    def meta_episodes(self, client_id: int, phase: str, round_number: int) -> list[Episode]:
        """The client's K meta iterations of a round: the same data in new orders that follow from the seed."""
        client = self.data.client(client_id, seed=derive_seed(self.seed, phase, round_number, client_id))
        loader = client.train_dataloader()
        val = self._batches(client.val_dataloader(), "val")
        return [
            self._episode(client_id, self._train_batches(loader), val) for _ in range(self.settings.meta_iterations)
        ]

    def personal_episode(self, client_id: int, parts: Sequence[str]) -> Episode:
        """The client's personalization, in one fixed order of batches, so that recipes are compared on equal terms.

        Args:
            client_id: the client's number in the data.
            parts: which of `val` and `test` to bring.
        """
        client = self.data.client(client_id, seed=derive_seed(self.seed, "personalize", client_id))
        return self._episode(
            client_id,
            self._train_batches(client.train_dataloader()),
            self._batches(client.val_dataloader(), "val") if "val" in parts else [],
            self._batches(client.test_dataloader(), "test") if "test" in parts else [],
        )

    def _episode(self, client_id: int, train: list[Batch], val: list[Batch], test: Sequence[Batch] = ()) -> Episode:
        start = self.settings.running_start
        return make_episode(self.model, self.statistics(client_id), train, val, test, running_start=start)

    def _train_batches(self, loader: Any) -> list[Batch]:
        epochs = self.settings.finetune_epochs
        return to_model(gather_batches(loader, epochs=epochs, limit=self.limits.get("train")), self.model.module)

    def _batches(self, loader: Any, part: str) -> list[Batch]:
        limit = self.limits.get(part)
        # Lightning's 0 means no validation of its own; the validation loss is still needed.
        return to_model(gather_batches(loader, limit=limit or None if part == "val" else limit), self.model.module)

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
            self.automatic_sizes[batch_size] = self.learner.cohort_size(self._zeros(batch_size))
        return self.automatic_sizes[batch_size]

    def _zeros(self, batch_size: int) -> torch.Tensor:
        reference = next(self.model.module.parameters(), torch.zeros(()))
        return reference.new_zeros((batch_size, *self.data.input_shape))

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
            client_ids: the clients' numbers in the data.
            round_number: another round gives other orders of the batches.
            phase: another word gives other orders (L2P's, say).
            meta_lr_scale: multiplies the meta learning rates.

        Returns:
            One update a client, in order.
        """
        torch.manual_seed(derive_seed(self.seed, phase, round_number, *client_ids))
        updates: dict[int, MetaUpdate] = {}
        for positions in self._cohorts(client_ids):
            episodes = [self.meta_episodes(client_ids[i], phase, round_number) for i in positions]
            starts = [lambdas[i] for i in positions]
            if self.trainer_arguments is not None:
                done = [self._fit(*one, meta_lr_scale=meta_lr_scale) for one in zip(starts, episodes, strict=True)]
            else:
                rows = list(zip(*episodes, strict=True))
                with self.fabric.autocast():
                    done = self.learner.meta_update(starts, rows, meta_lr_scale=meta_lr_scale)
            updates |= dict(zip(positions, done, strict=True))
        return [updates[i] for i in range(len(client_ids))]

    def evaluate(
        self,
        recipes: Sequence[Hyperparameters],
        client_ids: Sequence[int],
        *,
        parts: Sequence[str] = ("val",),
        bn_mode: BatchNormMode | None = None,
        finetune: bool = True,
        view: View = as_it_is,
    ) -> list[dict[str, Evaluation]]:
        """Personalizes clients and measures them, see `Learner.evaluate`; `view` rearranges their data first."""
        torch.manual_seed(derive_seed(self.seed, "evaluate", *client_ids))
        results: dict[int, dict[str, Evaluation]] = {}
        for positions in self._cohorts(client_ids):
            episodes = [view(self.personal_episode(client_ids[i], parts)) for i in positions]
            chosen = [recipes[i] for i in positions]
            with self.fabric.autocast():
                done = self.learner.evaluate(episodes, chosen, parts=parts, bn_mode=bn_mode, finetune=finetune)
            results |= dict(zip(positions, done, strict=True))
        return [results[i] for i in range(len(client_ids))]

    def refine(
        self,
        recipes: Sequence[Hyperparameters],
        client_ids: Sequence[int],
        settings: RefinementSettings,
        *,
        parts: Sequence[str] = ("val",),
        view: View = as_it_is,
    ) -> list[Refined]:
        """Clients better recipes on their own data, see `Learner.refine`; `parts` and `view` as in `evaluate`."""
        torch.manual_seed(derive_seed(self.seed, "refine", *client_ids))
        results: dict[int, Refined] = {}
        for positions in self._cohorts(client_ids):
            episodes = [view(self.personal_episode(client_ids[i], parts)) for i in positions]
            with self.fabric.autocast():
                done = self.learner.refine(episodes, [recipes[i] for i in positions], settings)
            results |= dict(zip(positions, done, strict=True))
        return [results[i] for i in range(len(client_ids))]

    def _fit(self, lambda_: Tensors, episodes: list[Episode], *, meta_lr_scale: float) -> MetaUpdate:
        """One client as a LightningModule in a Trainer, which may move and cast the copies that it is given."""
        assert self.trainer_arguments is not None
        nets = copy.deepcopy(self.meta_nets)
        nets.load_state_dict(lambda_, strict=False)
        client = FedL2PClient(
            self.model.module,
            meta_nets=nets,
            estimator=self.learner.estimator,
            settings=self.settings,
            loss_fn=self.model.loss_fn,
            val_loss_fn=self.model.val_loss_fn,
            meta_lr={group: rate * meta_lr_scale for group, rate in vars(self.settings.meta_lr).items()},
        )
        client.learner.single = self.learner.single
        loader: DataLoader[Episode] = DataLoader(episodes, batch_size=None, collate_fn=as_it_is)  # type: ignore[arg-type]  # a list will do
        # The validation loss is part of an episode; Lightning's own validation would fine-tune once more.
        quiet_trainer(self.trainer_arguments | {"limit_val_batches": 0}).fit(client, loader, loader)
        after = {name: p.detach().to(lambda_[name]) for name, p in nets.named_parameters()}
        assert client.hyperparameters is not None
        recipe = Hyperparameters(*(t.detach().to(self.meta_nets.base_lr) for t in client.hyperparameters))
        return MetaUpdate(after, torch.tensor(client.val_losses), client.skipped_steps, recipe)


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
    }
    if arguments.get("devices", "auto") == "auto":
        arguments = arguments | {"devices": 1}  # many clients, each on one device
    return L.Trainer(**(defaults | arguments))
