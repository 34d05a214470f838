"""`fedl2p run --dry-run`: how long a run would take, from a few steps that are measured; nothing is written."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedl2p.datamodules.base.federated import POOLS
from fedl2p.experiment.build import build_runtime, build_training
from fedl2p.experiment.context import RunContext, prepare
from fedl2p.experiment.evaluation import evaluations, hypergradients
from fedl2p.experiment.methods import tuned_methods
from fedl2p.experiment.recommendation import CANDIDATES
from fedl2p.experiment.schema import Config
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.progress import duration

MEASURED_EPOCHS = 3  # at most; the time of more of them follows from the first and these
MEASURED_SIZES = 3  # of clients: the smallest, the median and the largest
REPEAT_BELOW = 2.0  # seconds: what was as quick as that is measured again, warm


@dataclass(frozen=True)
class StageEstimate:
    """One stage: how many inner gradient steps over all clients, and how many seconds."""

    name: str
    steps: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a run would cost.

    Attributes:
        clients: by pool.
        stages: in their order; a run that loses patience takes fewer rounds.
        memory: bytes at the peak while measuring; of the GPU where there is one.
    """

    clients: dict[str, int]
    stages: tuple[StageEstimate, ...]
    memory: int

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)


@dataclass(frozen=True, eq=False)
class _ClientCost:
    """Seconds of one client by its number of training samples: for K meta iterations, and for one personalization."""

    sizes: Sequence[int]
    meta: Sequence[float]
    evaluation: Sequence[float]

    def total(self, kind: str, sizes: Sequence[int]) -> float:
        """Of clients of these sizes; sizes that were not measured lie between those that were."""
        return float(np.interp(sizes, self.sizes, getattr(self, kind)).sum())


def dry_run(config: Config, *, resume: bool = False) -> Estimate:
    """Estimates a run and prints the estimate.

    Args:
        config: from `load_config`.
        resume: see `prepare`; what is done already is not subtracted.

    Raises:
        ConfigError: a component of the configuration is wrong.
        RunFolderError: the run's folder could not be used.
    """
    estimate = estimate_run(prepare(config, resume=resume))
    console = Console()
    console.print("Clients: " + ", ".join(f"{count} {pool}" for pool, count in estimate.clients.items()))
    table = Table("Stage", "inner steps", "time")
    for stage in estimate.stages:
        table.add_row(stage.name, f"{stage.steps:,}", duration(stage.seconds))
    table.add_row("all", f"{sum(stage.steps for stage in estimate.stages):,}", duration(estimate.seconds))
    console.print(table)
    console.print(f"Time: about {estimate.seconds / 3600:.2g} hours on this machine, in one process.", highlight=False)
    console.print(f"Memory: about {estimate.memory / 1e9:.2g} GB at the peak of what was measured.", highlight=False)
    return estimate


def estimate_run(context: RunContext) -> Estimate:
    """Measures a few clients for a few epochs, and multiplies."""
    config, data = context.config, context.data
    cost = _client_cost(context)
    sizes = {pool: [data.client_sizes(i)[0] for i in data.pool(pool)] for pool in POOLS}
    steps = {pool: sum(_steps(context, size) for size in own) for pool, own in sizes.items()}
    federation, seen = config.federation, len(sizes["seen"])
    evaluate = {pool: cost.total("evaluation", sizes[pool]) for pool in ("seen", "unseen")}
    meta = {pool: cost.total("meta", sizes[pool]) for pool in ("seen", "unseen")}
    iterations = config.client.meta_iterations
    share = max(1, round(federation.client_fraction * seen)) / seen
    validated = max(1, round(federation.validation_fraction * seen)) / seen
    calls = max(1, round(federation.rounds * share)) * config.baselines.l2p
    tuned = len(tuned_methods(config)) * len(config.baselines.rates) * config.baselines.tune
    tested, refined = evaluations(config), hypergradients(config) / iterations
    chosen = 2 * (config.refinement.steps + 1) / iterations * (config.refinement.steps > 0)

    def pool_stage(name: str, pool: str, meta_passes: float, passes: float) -> StageEstimate:
        """Passes over all clients of a pool: meta updates, and personalizations."""
        inner = round((meta_passes * iterations + passes) * steps[pool])
        return StageEstimate(name, inner, meta_passes * meta[pool] + passes * evaluate[pool])

    def stage(name: str, meta_passes: float, seen_passes: float) -> StageEstimate:
        return pool_stage(name, "seen", meta_passes, seen_passes)

    def both(name: str, meta_passes: float, passes: float) -> StageEstimate:
        seen, unseen = (pool_stage(name, pool, meta_passes, passes) for pool in ("seen", "unseen"))
        return StageEstimate(name, seen.steps + unseen.steps, seen.seconds + unseen.seconds)

    stages = (
        _pretraining(context),
        stage("tuning", 0, tuned),
        stage("rounds", federation.rounds * share, (federation.rounds + 1) * validated),
        stage("l2p", calls, 0),
        both("evaluation", 0, tested),
        both("refinement", refined, 0),
        stage("recommendation", chosen, CANDIDATES * 2 * bool(chosen)),
    )
    return Estimate({pool: len(own) for pool, own in sizes.items()}, stages, _peak_memory())


def _steps(context: RunContext, size: int) -> int:
    """Gradient steps in one fine-tuning of a client."""
    return context.config.client.finetune_epochs * math.ceil(size / context.data.batch_size)


def _client_cost(context: RunContext) -> _ClientCost:
    """What clients of a few sizes take, measured with few epochs where the configuration has many."""
    epochs, groups = context.config.client.finetune_epochs, _groups(context)
    if epochs <= MEASURED_EPOCHS:
        times = _measured(context, epochs, groups)
    else:
        first, last = (_measured(context, number, groups) for number in (1, MEASURED_EPOCHS))
        slope = np.maximum(last - first, 0) / (MEASURED_EPOCHS - 1)
        times = last + slope * (epochs - MEASURED_EPOCHS)
    meta, evaluation = times[:, 0] * context.config.client.meta_iterations, times[:, 1]
    return _ClientCost(list(groups), meta.tolist(), evaluation.tolist())


def _groups(context: RunContext) -> dict[int, list[int]]:
    """Seen clients that a round would take together, by their number of training samples, the smallest first."""
    by_sizes: dict[tuple[int, ...], list[int]] = {}
    for client_id in context.data.pool("seen"):
        by_sizes.setdefault(context.data.client_sizes(client_id), []).append(client_id)
    largest: dict[int, list[int]] = {}
    for (size, *_), ids in sorted(by_sizes.items()):
        if len(ids) > len(largest.get(size, [])):
            largest[size] = ids
    positions = np.linspace(0, len(largest) - 1, min(MEASURED_SIZES, len(largest))).round().astype(int)
    chosen = [list(largest)[position] for position in positions]
    fraction = context.config.federation.client_fraction
    return {size: largest[size][: max(1, round(fraction * len(largest[size])))] for size in chosen}


def _measured(context: RunContext, epochs: int, groups: dict[int, list[int]]) -> np.ndarray:
    """Seconds a client of each group: of one meta iteration, and of one personalization."""
    client = replace(context.config.client, finetune_epochs=epochs, meta_iterations=1)
    # A rate of 0 would spare the gradients that a run has to take.
    base_lr = context.config.meta_nets.base_lr or min(context.config.baselines.rates)
    config = replace(context.config, client=client)
    runtime: ClientRuntime = build_runtime(config, context.data, context.model, base_lr=base_lr)
    lambda_, rows = runtime.lambda_(), []
    for ids in groups.values():
        recipes = [runtime.recipe(lambda_, client_id) for client_id in ids]
        meta = _seconds(lambda ids=ids: runtime.meta_update([lambda_] * len(ids), ids, 1))  # type: ignore[misc]  # of the default
        evaluation = _seconds(lambda ids=ids, recipes=recipes: runtime.evaluate(recipes, ids))  # type: ignore[misc]  # likewise
        rows.append((meta / len(ids), evaluation / len(ids)))
    return np.array(rows)


def _pretraining(context: RunContext) -> StageEstimate:
    """FedAvg, from one client of median size."""
    settings, ids = context.config.pretraining, context.data.pool(context.config.pretraining.pool)
    if settings.weights is not None or not settings.rounds or not ids:
        return StageEstimate("pretraining", 0, 0.0)
    sizes = {client_id: context.data.client_sizes(client_id)[0] for client_id in ids}
    chosen = sorted(ids, key=lambda client_id: sizes[client_id])[len(ids) // 2]
    training, tensors = build_training(context.config, context.data, context.model), context.model.state_dict()
    seconds = _seconds(lambda: training.train(tensors, chosen, 1))
    visits = settings.rounds * max(1, round(settings.client_fraction * len(ids)))
    batches = np.mean([math.ceil(size / context.data.batch_size) for size in sizes.values()])
    return StageEstimate("pretraining", round(visits * settings.epochs * float(batches)), visits * seconds)


def _seconds(work: Callable[[], object]) -> float:
    """The time of `work`; where that is short, of a second call, since the first one also gets things ready."""
    for _ in range(2):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if seconds > REPEAT_BELOW:
            break
    return seconds


def _peak_memory() -> int:
    """Bytes: of this process, or of the GPU where one was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":  # does not say
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
