"""The learner: everything that Algorithm 1 asks of a client, for one episode or for a cohort of them.

A Lightning module, a federation and a test all use this one; what it computes are the pure functions of `meta_step`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fedl2p.core.cohort import automatic_cohort_size, groups, stack, take
from fedl2p.core.differentiation import FUNC_TRANSFORMS, Autograd, CompiledSteps, Differentiation
from fedl2p.core.episode import Episode
from fedl2p.core.finetune import active_parameters, evaluate
from fedl2p.core.functional import (
    Batch,
    FunctionalModel,
    InnerState,
    Inputs,
    Tensors,
    concatenate,
    outside_inference_mode,
)
from fedl2p.core.hypergradients import HypergradientEstimator, Unrolled
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.meta_step import MetaStep, active_in_episode, meta_optimizer, meta_step, personalize
from fedl2p.core.refinement import Refined, refine
from fedl2p.core.settings import BatchNormMode, LearnerSettings, RefinementSettings
from fedl2p.errors import DataError


class Evaluation(NamedTuple):
    """How one client does on one set: outputs (n, ...), targets (n, ...), mean loss and validation loss."""

    outputs: Any
    targets: Any
    loss: float
    val_loss: float


class MetaUpdate(NamedTuple):
    """What the meta iterations of one client give.

    Attributes:
        lambda_: the updated parameters of the nets, by name.
        val_losses: the validation loss of each iteration, before its update, shape (meta_iterations,).
        skipped: how many iterations were not finite and changed nothing.
        hyperparameters: the recipe of the last iteration.
    """

    lambda_: Tensors
    val_losses: Tensor
    skipped: int
    hyperparameters: Hyperparameters


class Learner:
    """Learns and personalizes on one global model.

    Attributes:
        model: the global model as a function.
        origin: theta_g and the global model's buffers.
        meta_nets: the structure of the nets; their parameters (lambda) are arguments.
        estimator: of the hypergradient.
        settings: how a client learns.
        single: how derivatives are taken for one client; a cohort's are always by `FuncTransforms`.
    """

    def __init__(
        self,
        model: FunctionalModel,
        meta_nets: MetaNets,
        *,
        estimator: HypergradientEstimator | None = None,
        settings: LearnerSettings | None = None,
        compile: bool = False,
    ) -> None:
        """Takes theta_g from the model's module.

        Args:
            model: from a converted module.
            meta_nets: BNNet and LRNet, made for this model.
            estimator: None is `Unrolled()`, the exact derivative (docs/hypergradients.md).
            settings: None is `LearnerSettings()`.
            compile: whether inner steps of single clients are compiled, see `CompiledSteps`.
        """
        self.model = model
        self.origin = InnerState(*model.tensors())
        self.meta_nets = meta_nets
        self.estimator = estimator if estimator is not None else Unrolled()
        self.settings = settings if settings is not None else LearnerSettings()
        self.single: Differentiation = CompiledSteps() if compile else Autograd()

    def fit_to(self, inputs: Inputs) -> None:
        """Prepares for batches of this size: the kernels that pay for networks too large to be stacked on a CPU.

        Args:
            inputs: of a training batch.
        """
        device = next(leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        if device.type == "cpu" and self.cohort_size(inputs) == 1 and not isinstance(self.single, CompiledSteps):
            for parameter in self.model.module.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            self.origin = InnerState(*self.model.tensors())
            self.single = Autograd(fused_batchnorm=True)

    def cohort_size(self, inputs: Inputs) -> int:
        """How many clients with such training batches are stacked at most, see `automatic_cohort_size`."""
        history = self.estimator.history(self.settings.finetune_epochs)  # at least; more batches keep more
        return automatic_cohort_size(self.model, inputs, history=history)

    def lambda_(self) -> Tensors:
        """The nets' own parameters, detached copies by name."""
        return {name: p.detach().clone() for name, p in self.meta_nets.named_parameters()}

    def recipe(self, lambda_: Tensors, net_inputs: tuple[Tensor, Tensor, Tensor]) -> Hyperparameters:
        """What `lambda_` answers for a client (Eq. 4)."""
        with torch.no_grad():
            answer: Hyperparameters = functional_call(self.meta_nets, lambda_, net_inputs)
        return answer

    def meta_step(self, lambda_: Tensors, episode: Episode) -> MetaStep:
        """One meta iteration of one client, or of a cohort with a lambda for each of its clients, all stacked.

        Raises:
            DataError: there are no validation data.
        """
        _require([episode], "val")
        active = active_in_episode(self.model, self.meta_nets, lambda_, episode)

        def step(differentiation: Differentiation, lambda_: Tensors, episode: Episode) -> MetaStep:
            return meta_step(
                self.model,
                self.meta_nets,
                self.estimator,
                self.origin,
                lambda_,
                episode,
                clip_value=self.settings.clip_value,
                bn_mode=self.settings.evaluation_statistics,
                active=active,
                differentiation=differentiation,
            )

        return MetaStep(*self._over_clients(step, episode.cohort_size, lambda_, episode))

    def meta_update(
        self,
        lambdas: Sequence[Tensors],
        iterations: Sequence[Sequence[Episode]],
        *,
        meta_lr_scale: float = 1.0,
        max_cohort: int | None = None,
    ) -> list[MetaUpdate]:
        """K meta iterations (lines 8 to 11 of Algorithm 1) of each client, from its own lambda.

        Args:
            lambdas: where each client starts.
            iterations: K rows of one episode a client; shapes of a client are the same in all rows.
            meta_lr_scale: multiplies the learning rates of the nets.
            max_cohort: how many clients are stacked at most; None stacks all of equal shapes.

        Returns:
            One update a client, in order.
        """
        results: dict[int, MetaUpdate] = {}
        for positions in groups(iterations[0], max_cohort):
            lambda_ = {name: p.detach().requires_grad_() for name, p in stack([lambdas[i] for i in positions]).items()}
            optimizer = meta_optimizer(lambda_, self.settings.meta_lr.scaled(meta_lr_scale))
            steps: list[MetaStep] = []
            for episodes in iterations:
                detached = {name: p.detach() for name, p in lambda_.items()}
                steps.append(self.meta_step(detached, stack([episodes[i] for i in positions])))
                for name, p in lambda_.items():
                    p.grad = steps[-1].gradients[name]
                optimizer.step()
            losses, finite = torch.stack([s.val_loss for s in steps]), torch.stack([s.finite for s in steps])
            for row, position in enumerate(positions):
                own = {name: p.detach()[row].clone() for name, p in lambda_.items()}
                skipped = int((~finite[:, row]).sum())
                results[position] = MetaUpdate(own, losses[:, row], skipped, take(steps[-1].hyperparameters, row))
        return [results[i] for i in range(len(iterations[0]))]

    def personalize(self, episode: Episode, hyperparameters: Hyperparameters) -> InnerState:
        """Fine-tunes one client with its recipe."""
        active = active_parameters(self.model, hyperparameters.eta)

        def tuned(differentiation: Differentiation, episode: Episode, recipe: Hyperparameters) -> InnerState:
            return personalize(
                self.model, self.origin, episode, recipe, active=active, differentiation=differentiation
            ).final

        return InnerState(*self._over_clients(tuned, None, episode, hyperparameters))

    def refine(
        self,
        episodes: Sequence[Episode],
        recipes: Sequence[Hyperparameters],
        settings: RefinementSettings,
        *,
        max_cohort: int | None = None,
    ) -> list[Refined]:
        """Betters each client's recipe on its own validation data, see `fedl2p.core.refinement`.

        Args:
            episodes: one a client.
            recipes: where each client starts.
            settings: how many steps, and how long.
            max_cohort: how many clients are stacked at most; None stacks all of equal shapes.

        Returns:
            One refined recipe a client, in order.

        Raises:
            DataError: a client has no validation data.
        """
        _require(episodes, "val")
        results: dict[int, Refined] = {}
        for positions in groups(episodes, max_cohort):
            recipe = stack([recipes[i] for i in positions])
            active = active_parameters(self.model, recipe.eta)

            def run(
                differentiation: Differentiation,
                episode: Episode,
                recipe: Hyperparameters,
                active: tuple[str, ...] = active,
            ) -> Refined:
                return refine(
                    self.model,
                    self.estimator,
                    self.origin,
                    episode,
                    recipe,
                    settings,
                    bn_mode=self.settings.evaluation_statistics,
                    active=active,
                    differentiation=differentiation,
                )

            done = self._over_clients(run, len(positions), stack([episodes[i] for i in positions]), recipe)
            results |= {position: take(done, row) for row, position in enumerate(positions)}
        return [results[i] for i in range(len(episodes))]

    def evaluate(
        self,
        episodes: Sequence[Episode],
        recipes: Sequence[Hyperparameters],
        *,
        parts: Sequence[str] = ("val", "test"),
        bn_mode: BatchNormMode | None = None,
        finetune: bool = True,
        max_cohort: int | None = None,
    ) -> list[dict[str, Evaluation]]:
        """Personalizes each client with its recipe, then measures it.

        Args:
            episodes: one a client.
            recipes: one a client.
            parts: which of `val` and `test` to measure on.
            bn_mode: None is that of the settings.
            finetune: False measures theta_g without a step.
            max_cohort: how many clients are stacked at most; None stacks all of equal shapes.

        Returns:
            By client, in order, one evaluation by part.

        Raises:
            DataError: a client has no data for a part.
        """
        for part in parts:
            _require(episodes, part)
        results: dict[int, dict[str, Evaluation]] = {}
        for positions in groups(episodes, max_cohort):
            recipe = stack([recipes[i] for i in positions])
            active = active_parameters(self.model, recipe.eta) if finetune else None
            run = partial(self._measure, parts=parts, bn_mode=bn_mode, active=active)
            measured = self._over_clients(run, len(positions), stack([episodes[i] for i in positions]), recipe)
            for row, position in enumerate(positions):
                results[position] = {
                    part: Evaluation(
                        take(outputs, row), _targets(episodes[position], part), float(loss[row]), float(val_loss[row])
                    )
                    for part, (outputs, loss, val_loss) in measured.items()
                }
        return [results[i] for i in range(len(episodes))]

    def _measure(
        self,
        differentiation: Differentiation,
        episode: Episode,
        recipe: Hyperparameters,
        *,
        parts: Sequence[str],
        bn_mode: BatchNormMode | None,
        active: tuple[str, ...] | None,
    ) -> dict[str, tuple[Any, Tensor, Tensor]]:
        """One client by part; without `active` it is not fine-tuned."""
        state = episode.start(self.origin)
        if active is not None:
            state = personalize(
                self.model, self.origin, episode, recipe, active=active, differentiation=differentiation
            ).final
        bn_mode = bn_mode or self.settings.evaluation_statistics
        return {
            part: evaluate(self.model, state, recipe.beta, getattr(episode, f"{part}_batches"), bn_mode=bn_mode)
            for part in parts
        }

    @outside_inference_mode
    def _over_clients(self, function: Callable[..., Any], clients: int | None, *args: Any) -> Any:
        """Applies `function(differentiation, ...)` to each client of stacked arguments.

        Without `clients` the arguments are of one client, not stacked. A cohort of one goes without `torch.vmap`.
        """
        if clients is None:
            return function(self.single, *args)
        if clients > 1:
            return torch.vmap(partial(function, FUNC_TRANSFORMS), randomness="different")(*args)
        one = function(self.single, *(take(arg, 0) for arg in args))
        return pytree.tree_map(lambda leaf: leaf[None], one)


def _require(episodes: Sequence[Episode], part: str) -> None:
    if any(not getattr(episode, f"{part}_batches") for episode in episodes):
        raise DataError(f"A client has no {part} data to be measured on.")


def _targets(episode: Episode, part: str) -> Any:
    batches: Sequence[Batch] = getattr(episode, f"{part}_batches")
    return concatenate([targets for _, targets in batches])
