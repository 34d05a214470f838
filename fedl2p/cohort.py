"""A cohort: clients whose tensors have equal shapes, stacked and passed through the same functions by `torch.vmap`.

Every function takes any clients, groups them by shape, and answers in the order that it was given.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedl2p.errors import DataError
from fedl2p.finetune import (
    Batch,
    EvaluationStatistics,
    FunctionalModel,
    InnerState,
    RunningStart,
    Tensors,
    initial_running,
    trained_names,
)
from fedl2p.hypergradients import HypergradientEstimator
from fedl2p.meta_nets import Hyperparameters, MetaNets
from fedl2p.meta_step import ClientInputs, evaluate, meta_optimizer, meta_step, personalize
from fedl2p.statistics import ClientStatistics


@dataclass(frozen=True, eq=False)
class ClientTask:
    """What one client brings to a meta iteration or to a personalization.

    Attributes:
        statistics: the client's, collected once.
        train_batches: one an inner step.
        val_batches: the validation set.
        test_batches: the test set; empty where it is not needed.
    """

    statistics: ClientStatistics
    train_batches: list[Batch]
    val_batches: list[Batch]
    test_batches: list[Batch]


class Evaluation(NamedTuple):
    """How one client does on one set: outputs (n, classes), targets (n,), mean loss and validation loss."""

    outputs: Tensor
    targets: Tensor
    loss: float
    val_loss: float


class MetaUpdate(NamedTuple):
    """One client's K meta iterations.

    Attributes:
        lambda_: the updated parameters of the nets, by name.
        val_losses: L_V before each iteration's update, shape (K,).
        skipped: how many iterations were not finite and changed nothing.
        hyperparameters: the recipe of the last iteration.
    """

    lambda_: Tensors
    val_losses: Tensor
    skipped: int
    hyperparameters: Hyperparameters


def groups(tasks: Sequence[ClientTask], cohort_size: int) -> Iterator[list[int]]:
    """Positions of tasks with equal shapes, at most `cohort_size` together, in a fixed order."""
    by_shape: dict[Any, list[int]] = {}
    for position, task in enumerate(tasks):
        batches = (task.train_batches, task.val_batches, task.test_batches)
        signature = tuple(tuple((x.shape, y.shape) for x, y in part) for part in batches)
        by_shape.setdefault(signature, []).append(position)
    for positions in by_shape.values():
        for start in range(0, len(positions), cohort_size):
            yield positions[start : start + cohort_size]


def stack(trees: Sequence[Any]) -> Any:
    """Stacks equal structures of tensors along a new first dimension."""
    flat = [pytree.tree_flatten(tree) for tree in trees]
    return pytree.tree_unflatten(
        [torch.stack(leaves) for leaves in zip(*(f[0] for f in flat), strict=True)], flat[0][1]
    )


def take(tree: Any, index: int) -> Any:
    """The entry `index` of a stacked structure."""
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def over_clients(function: Callable[..., Any], *args: Any) -> Any:
    """Applies `function` to each client of stacked arguments; a single client is passed as it is, without vmap."""
    if pytree.tree_leaves(args[-1])[0].shape[0] > 1:
        return torch.vmap(function, randomness="different")(*args)
    return pytree.tree_map(lambda leaf: leaf[None], function(*(take(arg, 0) for arg in args)))


class CohortRunner:
    """Runs clients in cohorts on one global model.

    Attributes:
        model: the global model as a function.
        origin: theta_g and the global model's buffers.
        cohort_size: how many clients are stacked at most; 1 runs them one by one.
        running_start: where the running statistics start, see `initial_running`.
    """

    def __init__(
        self, model: FunctionalModel, *, cohort_size: int = 16, running_start: RunningStart = "measured"
    ) -> None:
        """Takes theta_g from the model's module; arguments as the attributes."""
        self.model = model
        self.origin = InnerState(*model.tensors())
        self.cohort_size = cohort_size
        self.running_start = running_start

    def meta_update(
        self,
        meta_nets: MetaNets,
        estimator: HypergradientEstimator,
        lambdas: Sequence[Tensors],
        iterations: Sequence[Sequence[ClientTask]],
        *,
        meta_lr: dict[str, float],
        clip_value: float = 1.0,
        statistics: EvaluationStatistics = "running",
    ) -> list[MetaUpdate]:
        """K meta iterations (lines 8 to 11 of Algorithm 1) of each client, from its own lambda.

        Args:
            meta_nets: the structure of the nets.
            estimator: of the hypergradient.
            lambdas: where each client starts.
            iterations: K rows of one task a client; shapes of a client are the same in all rows.
            meta_lr: see `meta_optimizer`.
            clip_value: see `meta_step`.
            statistics: of the evaluation in L_V, see `evaluation_loss`.

        Returns:
            One update a client, in order.
        """
        results: dict[int, MetaUpdate] = {}

        def step(lambda_: Tensors, client: ClientInputs) -> tuple[Any, ...]:
            done = meta_step(
                self.model,
                meta_nets,
                estimator,
                self.origin,
                lambda_,
                client,
                clip_value=clip_value,
                statistics=statistics,
            )
            return done.gradients, done.val_loss, done.finite, done.hyperparameters

        for positions in groups(iterations[0], self.cohort_size):
            lambda_ = {name: p.detach().requires_grad_() for name, p in stack([lambdas[i] for i in positions]).items()}
            optimizer = meta_optimizer(lambda_, meta_lr)
            losses, finite = [], []
            for tasks in iterations:
                client = self._inputs([tasks[i] for i in positions])
                detached = {name: p.detach() for name, p in lambda_.items()}
                gradients, loss, ok, recipe = over_clients(step, detached, client)
                for name, p in lambda_.items():
                    p.grad = gradients[name]
                optimizer.step()
                losses.append(loss)
                finite.append(ok)
            values, good = torch.stack(losses), torch.stack(finite)
            for row, position in enumerate(positions):
                own = {name: p.detach()[row].clone() for name, p in lambda_.items()}
                skipped = int((~good[:, row]).sum())
                results[position] = MetaUpdate(own, values[:, row], skipped, take(recipe, row))
        return [results[i] for i in range(len(iterations[0]))]

    def evaluate(
        self,
        tasks: Sequence[ClientTask],
        recipes: Sequence[Hyperparameters],
        *,
        parts: Sequence[str] = ("val", "test"),
        statistics: EvaluationStatistics = "running",
        finetune: bool = True,
    ) -> list[dict[str, Evaluation]]:
        """Personalizes each client with its recipe, then measures it.

        Args:
            tasks: one a client.
            recipes: one a client.
            parts: which of `val` and `test` to measure on.
            statistics: see `meta_step.evaluate`.
            finetune: False measures theta_g without a step.

        Returns:
            By client, in order, one evaluation by part.

        Raises:
            DataError: a client has no data for a part.
        """
        results: dict[int, dict[str, Evaluation]] = {}
        for part in parts:
            if any(not getattr(task, f"{part}_batches") for task in tasks):
                raise DataError(f"A client has no {part} data to be measured on.")
        for positions in groups(tasks, self.cohort_size):
            chosen = [tasks[i] for i in positions]
            recipe = stack([recipes[i] for i in positions])
            trained = trained_names(self.model, recipe.eta)
            batches = {part: stack([getattr(task, f"{part}_batches") for task in chosen]) for part in parts}

            def run(
                client: ClientInputs,
                recipe: Hyperparameters,
                batches: dict[str, list[Batch]],
                trained: tuple[str, ...] = trained,
            ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
                state = client.start(self.origin)
                if finetune:
                    state = personalize(self.model, state, client.train_batches, recipe, trained).final
                return {
                    part: evaluate(self.model, state, recipe.beta, data, statistics=statistics)
                    for part, data in batches.items()
                }

            measured = over_clients(run, self._inputs(chosen), recipe, batches)
            for row, position in enumerate(positions):
                results[position] = {
                    part: Evaluation(
                        outputs[row],
                        torch.cat([y for _, y in getattr(tasks[position], f"{part}_batches")]),
                        float(loss[row]),
                        float(val_loss[row]),
                    )
                    for part, (outputs, loss, val_loss) in measured.items()
                }
        return [results[i] for i in range(len(tasks))]

    def _inputs(self, tasks: Sequence[ClientTask]) -> ClientInputs:
        """The tasks, stacked."""
        return ClientInputs(
            net_inputs=stack([task.statistics.net_inputs() for task in tasks]),
            running=stack(
                [
                    initial_running(self.model, self.origin.buffers, task.statistics, start=self.running_start)
                    for task in tasks
                ]
            ),
            train_batches=stack([task.train_batches for task in tasks]),
            val_batches=stack([task.val_batches for task in tasks]),
        )
