"""Trained nets for new clients: their recipe by one pass over the data, and a plain model that is theirs."""

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedl2p.core.batchnorm import MixedBatchNorm, convert_batchnorm
from fedl2p.core.episode import make_episode
from fedl2p.core.finetune import active_parameters, finetune, to_model
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, LossFunction, batch_size, concatenate
from fedl2p.core.learner import Learner
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.recalibration import recalibrated_running
from fedl2p.core.refinement import RefinementSettings
from fedl2p.core.settings import LearnerSettings
from fedl2p.core.statistics import ClientStatistics, collect_statistics
from fedl2p.errors import ModelError
from fedl2p.policy.data import read_batches, require_two_samples
from fedl2p.policy.files import MEAN_RECIPE, META_NETS, PolicyFile, read_mean_recipe, read_policy
from fedl2p.policy.folding import fold
from fedl2p.policy.hyperparameters import (
    NamedHyperparameters,
    UnusualClientWarning,
    describe_unusual,
    unusual_inputs,
)

HELD_OUT = 0.25
"""The share of the training data that refinement judges by where there are no validation data."""


@dataclass(frozen=True, eq=False)
class Personalization:
    """What a new client gets.

    Attributes:
        model: a copy of the client's model with its personalized parameters and plain batch norms, in evaluation mode.
        hyperparameters: the recipe that it was fine-tuned with.
        statistics: of the training data in the global model.
        train_losses: the training loss before each step.
        refinement_losses: the validation loss of the recipe as given and of each refined one that was tried; empty
            without refinement.
    """

    model: nn.Module
    hyperparameters: NamedHyperparameters
    statistics: ClientStatistics
    train_losses: list[float]
    refinement_losses: list[float]


@dataclass(frozen=True, eq=False)
class _Client:
    """A new client as the core knows it: the model that it was given, and one pass over its data."""

    learner: Learner
    batches: list[Batch]
    statistics: ClientStatistics

    @property
    def model(self) -> FunctionalModel:
        return self.learner.model

    @property
    def nets(self) -> MetaNets:
        return self.learner.meta_nets


class Policy:
    """Nets that were learned by a federation, for clients that took no part in it.

        policy = Policy.load("runs/digits")
        hyperparameters = policy(model, loader)
        personalized = policy.personalize(model, loader)

    `model` is the global model that the nets were learned on: an ordinary module, whose weights are those of the run's
    `global_model.safetensors`. It is never changed. `loader` gives batches (inputs, targets) of the client's training
    data, preprocessed as in the run.

    Attributes:
        settings: how clients learned; a new one fine-tunes for `settings.finetune_epochs`.
        mean_recipe: of the seen clients; None where it was not kept.
    """

    def __init__(
        self,
        stored: PolicyFile,
        *,
        mean_recipe: NamedHyperparameters | None = None,
        settings: LearnerSettings | None = None,
        loss_fn: LossFunction = nn.functional.cross_entropy,
        val_loss_fn: LossFunction | None = None,
    ) -> None:
        """Takes nets as they were stored; `load` reads them.

        Args:
            stored: the nets.
            mean_recipe: of the seen clients.
            settings: how a new client fine-tunes; None is as those of the run did.
            loss_fn: what fine-tuning lowers.
            val_loss_fn: what refinement lowers; None is `loss_fn`.
        """
        self.settings: LearnerSettings = settings or stored.settings
        self.mean_recipe = mean_recipe
        self._stored = stored
        self._losses = loss_fn, val_loss_fn

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        names: Mapping[str, str] | None = None,
        settings: LearnerSettings | None = None,
        loss_fn: LossFunction = nn.functional.cross_entropy,
        val_loss_fn: LossFunction | None = None,
    ) -> "Policy":
        """Reads a policy; no code is unpickled.

        Args:
            path: a run's folder, or a `meta_nets.safetensors`.
            names: for a model whose layers have other names than the run's: from a layer of the run's model, or a
                module with layers in it, to its name in yours, as {"features": "backbone.features"}. The layers must
                come in the same order.
            settings: how a new client fine-tunes; None is as those of the run did.
            loss_fn: (outputs, targets) -> mean loss over the samples, what fine-tuning lowers.
            val_loss_fn: likewise, what refinement lowers; None is `loss_fn`.

        Raises:
            ModelError: a file cannot be read, was cut off or changed, or the map names a layer that is not there.
        """
        file = Path(path)
        file = file / META_NETS if file.is_dir() else file
        stored = read_policy(file)
        mean = read_mean_recipe(file.with_name(MEAN_RECIPE))
        if names:
            stored = stored.renamed(names)
        recipe = None
        if mean is not None:
            # In the order in which the nets' own names are stored, so that a map of names holds here too.
            own = zip(mean, ("batchnorm_names", "parameter_names"), strict=True)
            recipe = NamedHyperparameters(
                *(dict(zip(stored.names[kind], part.values(), strict=True)) for part, kind in own)
            )
        return cls(stored, mean_recipe=recipe, settings=settings, loss_fn=loss_fn, val_loss_fn=val_loss_fn)

    def __call__(self, model: nn.Module, loader: Iterable[Any]) -> NamedHyperparameters:
        """The client's hyperparameters, by one pass over its training data.

        Args:
            model: the global model.
            loader: of (inputs, targets), without augmentation.

        Returns:
            beta and eta by name. Where the client is unlike the seen ones, a `UnusualClientWarning` says in what.

        Raises:
            ModelError: the policy is for another model.
            DataError: the model does not take the data, there is one sample alone, inputs are not finite, or a label
                is no class of the model.
        """
        return _answer(self._meet(model, loader))

    def personalize(self, model: nn.Module, loader: Iterable[Any], **options: Any) -> nn.Module:
        """A copy of the model, personalized, with ordinary batch norms; for arguments and errors see `adapt`."""
        return self.adapt(model, loader, **options).model

    def adapt(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        hyperparameters: NamedHyperparameters | None = None,
        refine: RefinementSettings | None = None,
        val_loader: Iterable[Any] | None = None,
        recalibrate: bool = True,
        statistics_loader: Iterable[Any] | None = None,
    ) -> Personalization:
        """Asks for the recipe, fine-tunes with it, and folds the mixed statistics into plain batch norms.

        Args:
            model: the global model.
            loader: of (inputs, targets), the training data; one pass an epoch.
            hyperparameters: the recipe in the place of the nets' answer, as `policy.mean_recipe`.
            refine: betters the learning rates on validation data first; each step costs a fine-tuning.
            val_loader: the validation data that refinement judges by; None holds a quarter of the training data
                out for it (fine-tuning then has all of them again).
            recalibrate: whether the running statistics are measured again after fine-tuning, by one more pass; without,
                they are those that followed the training batches.
            statistics_loader: the training data without augmentation, where `loader` augments.

        Raises:
            ModelError: the policy is for another model, or fine-tuning did not stay finite.
            DataError: as in a call of the policy.
        """
        client = self._meet(model, loader if statistics_loader is None else statistics_loader)
        named = _answer(client) if hyperparameters is None else hyperparameters
        recipe, losses = named.vectors(client.nets), list[float]()
        if refine is not None:
            recipe, losses = self._refined(client, recipe, refine, val_loader)
        state, train_losses = _finetuned(client, recipe, loader, self.settings.finetune_epochs)
        if recalibrate and client.model.batchnorm_names:
            inputs = [inputs for inputs, _ in client.batches]
            with torch.no_grad():
                measured = recalibrated_running(client.model, state, recipe.beta, inputs)
            state = InnerState(state.parameters, {**state.buffers, **measured})
        _require_finite(state)
        return Personalization(
            model=fold(model, client.model, state, recipe.beta),
            hyperparameters=NamedHyperparameters.of(recipe, client.nets, named.unusual),
            statistics=client.statistics,
            train_losses=train_losses,
            refinement_losses=losses,
        )

    def _meet(self, model: nn.Module, loader: Iterable[Any]) -> _Client:
        if any(isinstance(module, MixedBatchNorm) for module in model.modules()):
            raise ModelError("The model is converted already; a policy takes it with its own batch-norm layers.")
        converted = convert_batchnorm(model).requires_grad_(False)
        nets = self._stored.nets_for(converted)
        functional = FunctionalModel.of(converted, *self._losses)
        batches = read_batches(functional, loader, what="training", input_shape=self._stored.input_shape)
        require_two_samples(batches)
        learner = Learner(functional, nets, settings=self.settings)
        learner.fit_to(batches[0][0])
        return _Client(learner, batches, collect_statistics(converted, batches))

    def _refined(
        self, client: _Client, recipe: Hyperparameters, settings: RefinementSettings, loader: Iterable[Any] | None
    ) -> tuple[Hyperparameters, list[float]]:
        """A better recipe, and the validation losses on the way."""
        if loader is None:
            train, val = _held_out(client.batches)
        else:
            shape = self._stored.input_shape
            train, val = client.batches, read_batches(client.model, loader, what="validation", input_shape=shape)
        episode = make_episode(
            client.model,
            client.statistics,
            train * self.settings.finetune_epochs,
            val,
            running_start=self.settings.running_start,
        )
        (refined,) = client.learner.refine([episode], [recipe], settings)
        return refined.hyperparameters, refined.val_losses.tolist()


def _answer(client: _Client) -> NamedHyperparameters:
    """What the nets say, with a warning where they have seen nothing like the client."""
    unusual = unusual_inputs(client.nets, client.statistics)
    if unusual:
        warnings.warn(describe_unusual(unusual), UnusualClientWarning, stacklevel=3)
    return NamedHyperparameters.of(client.nets.recipe(client.statistics), client.nets, unusual)


def _finetuned(
    client: _Client, recipe: Hyperparameters, loader: Iterable[Any], epochs: int
) -> tuple[InnerState, list[float]]:
    """theta_i after fine-tuning, and the losses on the way; one batch at a time is in memory."""
    start = client.learner.settings.running_start
    episode = make_episode(client.model, client.statistics, [], running_start=start)
    state = episode.start(client.learner.origin)
    active = active_parameters(client.model, recipe.eta)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            batches = to_model([tuple(batch)], client.model.module)
            tuned = finetune(
                client.model, state, batches, *recipe, active=active, differentiation=client.learner.single
            )
            state = tuned.final
            losses.append(float(tuned.losses))
    return state, losses


def _held_out(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Divides batches into those for training, of the old sizes, and one for validation; always in the same way."""
    whole = concatenate(batches)
    count, size = batch_size(whole), batch_size(batches[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, round(HELD_OUT * count))
    rest = order[held:]
    parts = [rest[start : start + size] for start in range(0, len(rest), size)]
    if len(parts) > 1 and len(parts[-1]) == 1:  # one sample has no batch statistics
        parts[-2:] = [parts[-2] + parts[-1]]
    return [_rows(whole, part) for part in parts], [_rows(whole, order[:held])]


def _rows(batch: Batch, positions: list[int]) -> Batch:
    rows: Batch = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[positions], batch)
    return rows


def _require_finite(state: InnerState) -> None:
    broken = [name for part in state for name, tensor in part.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"Fine-tuning did not stay finite: '{broken[0]}' has values that are not ({len(broken)} tensors); the "
            "recipe does not suit these data, try the mean recipe of the seen clients or a refined one."
        )
