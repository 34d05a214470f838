"""A cohort: clients whose tensors have equal shapes, stacked and passed through the same functions by `torch.vmap`.

Every function takes any clients, groups them by shape, and answers in the order that it was given.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedl2p.core.finetune import EvaluationStatistics, InnerState, RunningStart, initial_running, trained_names
from fedl2p.core.functional import Batch, FunctionalModel, Tensors
from fedl2p.core.hypergradients import HypergradientEstimator
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.meta_step import ClientInputs, evaluate, meta_optimizer, meta_step, moved_names, personalize
from fedl2p.core.statistics import ClientStatistics
from fedl2p.errors import DataError


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


# Measured on 2 CPU cores: stacking pays as long as one pass of the whole cohort stays within about this many values
# (16 MB of them); beyond, the stacked convolutions are no faster, then slower, than one client after the other.
CPU_COHORT_VALUES = 6_000_000
MOST_CLIENTS = 64
GPU_MEMORY_SHARE = 0.5
_PASSES = 6  # of a client's activations in memory at once: forward, backward, and the tangents of both


def activations(model: FunctionalModel, inputs: Tensor) -> int:
    """How many values the layers of `model` put out for `inputs` in one forward pass."""
    count = 0

    def add(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal count
        count += sum(leaf.numel() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))

    leaves = [module for module in model.module.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(add) for module in leaves]
    try:
        with torch.no_grad():
            model.module.eval()(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return count


def automatic_cohort_size(model: FunctionalModel, inputs: Tensor, *, history: int) -> int:
    """How many clients to stack, by shapes and device alone, so that a run repeats.

    Args:
        model: the model.
        inputs: a training batch.
        history: states of the inner loop that the estimator keeps (each holds all parameters).

    Returns:
        1 to 64. On a CPU as many as keep a pass within `CPU_COHORT_VALUES` activations; on a GPU, whose rule is not
        measured but by memory, as many as fill half of it.
    """
    values = activations(model, inputs)
    if inputs.device.type != "cuda":
        return max(1, min(MOST_CLIENTS, CPU_COHORT_VALUES // max(values, 1)))
    parameters = sum(p.numel() for p in model.module.parameters())
    client_bytes = 4 * (_PASSES * values + (history + _PASSES) * parameters)
    budget = GPU_MEMORY_SHARE * torch.cuda.get_device_properties(inputs.device).total_memory
    return max(1, min(MOST_CLIENTS, int(budget // client_bytes)))


def groups(tasks: Sequence[ClientTask], cohort_size: int | None = None) -> Iterator[list[int]]:
    """Positions of tasks with equal shapes, at most `cohort_size` (None: all) together, in a fixed order."""
    by_shape: dict[Any, list[int]] = {}
    for position, task in enumerate(tasks):
        batches = (task.train_batches, task.val_batches, task.test_batches)
        signature = tuple(tuple((x.shape, y.shape) for x, y in part) for part in batches)
        by_shape.setdefault(signature, []).append(position)
    for positions in by_shape.values():
        size = cohort_size or len(positions)
        for start in range(0, len(positions), size):
            yield positions[start : start + size]


def stack(trees: Sequence[Any]) -> Any:
    """Stacks equal structures of tensors along a new first dimension."""
    flat = [pytree.tree_flatten(tree) for tree in trees]
    return pytree.tree_unflatten(
        [torch.stack(leaves) for leaves in zip(*(f[0] for f in flat), strict=True)], flat[0][1]
    )


def take(tree: Any, index: int) -> Any:
    """The entry `index` of a stacked structure."""
    return pytree.tree_map(lambda leaf: leaf[index], tree)


class CohortRunner:
    """Runs clients in cohorts on one global model.

    Attributes:
        model: the global model as a function.
        origin: theta_g and the global model's buffers.
        cohort_size: how many clients are stacked at most; 1 runs them one by one, None stacks all of equal shapes.
        running_start: where the running statistics start, see `initial_running`.
    """

    def __init__(
        self, model: FunctionalModel, *, cohort_size: int | None = None, running_start: RunningStart = "measured"
    ) -> None:
        """Takes theta_g from the model's module; arguments as the attributes."""
        self.model = replace(model, alone=False)
        self._one_model = replace(model, alone=True)
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

        def step(
            model: FunctionalModel, lambda_: Tensors, client: ClientInputs, *, trained: tuple[str, ...]
        ) -> tuple[Any, ...]:
            done = meta_step(
                model,
                meta_nets,
                estimator,
                self.origin,
                lambda_,
                client,
                clip_value=clip_value,
                statistics=statistics,
                trained=trained,
            )
            return done.gradients, done.val_loss, done.finite, done.hyperparameters

        for positions in groups(iterations[0], self.cohort_size):
            lambda_ = {name: p.detach().requires_grad_() for name, p in stack([lambdas[i] for i in positions]).items()}
            optimizer = meta_optimizer(lambda_, meta_lr)
            losses, finite = [], []
            for tasks in iterations:
                client = self._inputs([tasks[i] for i in positions])
                detached = {name: p.detach() for name, p in lambda_.items()}
                trained = moved_names(self.model, meta_nets, detached, client.net_inputs)
                function = partial(step, trained=trained)
                gradients, loss, ok, recipe = self._over_clients(function, detached, client)
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

        def run(
            model: FunctionalModel,
            client: ClientInputs,
            recipe: Hyperparameters,
            batches: dict[str, list[Batch]],
            *,
            trained: tuple[str, ...],
        ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
            state = client.start(self.origin)
            if finetune:
                state = personalize(model, state, client.train_batches, recipe, trained).final
            return {
                part: evaluate(model, state, recipe.beta, data, statistics=statistics) for part, data in batches.items()
            }

        for positions in groups(tasks, self.cohort_size):
            chosen = [tasks[i] for i in positions]
            recipe = stack([recipes[i] for i in positions])
            batches = {part: stack([getattr(task, f"{part}_batches") for task in chosen]) for part in parts}
            function = partial(run, trained=trained_names(self.model, recipe.eta))
            measured = self._over_clients(function, self._inputs(chosen), recipe, batches)
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

    def _over_clients(self, function: Callable[..., Any], *args: Any) -> Any:
        """Applies `function(model, ...)` to each client of stacked arguments; a single one goes without vmap."""
        if pytree.tree_leaves(args[-1])[0].shape[0] > 1:
            return torch.vmap(partial(function, self.model), randomness="different")(*args)
        return pytree.tree_map(lambda leaf: leaf[None], function(self._one_model, *(take(arg, 0) for arg in args)))

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
