"""The last stage: every method on the test data of the pools that it is for."""

from collections.abc import Callable, Sequence
from typing import Any

from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import BatchNormMode
from fedl2p.datamodules.base.federated import FederatedDataModule
from fedl2p.experiment.context import RunContext
from fedl2p.experiment.methods import FINE_TUNING, FixedRecipe, TunedRate, derangement
from fedl2p.experiment.results import MethodResult, client_table, mean_of
from fedl2p.experiment.schema import Config
from fedl2p.experiment.stages import LocalPolicies
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.federation.state import MetaState
from fedl2p.progress import ProgressBar
from fedl2p.seeding import derive_seed

POOLS = ("seen", "unseen")
SHUFFLES = 5  # one alone says little: a few clients can get statistics that suit them by chance

Recipe = Callable[[int], Hyperparameters]
"""A client's hyperparameters by its id."""


def evaluations(config: Config) -> int:
    """How many times the clients are personalized and tested."""
    return 2 + len(FINE_TUNING) + config.baselines.l2p + SHUFFLES * config.baselines.shuffled


def measured_methods(
    context: RunContext,
    runtime: ClientRuntime,
    rates: dict[str, TunedRate],
    base_lr: float,
    state: MetaState,
    local: LocalPolicies | None,
) -> dict[str, MethodResult]:
    """Stage 5: the global model, the baselines, L2P, FedL2P and the ablation.

    Args:
        context: of the run.
        runtime: the clients.
        rates: of the hand-made recipes.
        base_lr: eta~ before the first round.
        state: of the rounds, with the best lambda.
        local: of L2P; None leaves it out.
    """
    best, methods = state.best_lambda, {}
    settings = {"base_lr": base_lr, "best_round": state.best_round}
    with context.bar("Testing all methods", evaluations(context.config)) as bar:

        def measure(label: str, recipe: Recipe, *, pools: Sequence[str] = POOLS, **options: Any) -> MethodResult:
            return _measure(context.data, runtime, bar, label, recipe, pools=pools, **options)

        nothing = fixed_recipe(runtime, 0.0, 0.0)
        methods["global"] = measure("Global model", nothing, finetune=False, bn_mode=BatchNormMode.running)
        for name, method in FINE_TUNING.items():
            methods[name] = measure(
                method.label,
                fixed_recipe(runtime, method.beta, rates[name].rate),
                bn_mode=method.bn_mode,
                settings=rates[name].as_dict(),
            )
        if local is not None:
            lambdas = local.lambdas
            methods["l2p"] = measure(
                "L2P",
                lambda i: runtime.recipe(lambdas[i], i),
                pools=("seen",),
                settings={"meta_iterations": local.calls * context.config.client.meta_iterations},
            )
        methods["fedl2p"] = measure("FedL2P", lambda i: runtime.recipe(best, i), settings=settings)
        if context.config.baselines.shuffled:
            label, shuffled = "FedL2P, statistics shuffled", []
            for number in range(SHUFFLES):
                others = other_clients(context.data, context.config.seed, number)
                recipes = {i: runtime.recipe(best, other) for i, other in others.items()}
                shuffled.append(measure(label, recipes.__getitem__))
            methods["fedl2p_shuffled"] = mean_of(shuffled, settings={"shuffles": SHUFFLES})
    return methods


def _measure(
    data: FederatedDataModule,
    runtime: ClientRuntime,
    bar: ProgressBar,
    label: str,
    recipe: Recipe,
    *,
    pools: Sequence[str],
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> MethodResult:
    """One method on its pools; `options` are those of `ClientRuntime.evaluate`."""
    result = MethodResult(label, settings or {}, {})
    for pool in pools:
        ids = data.pool(pool)
        if ids:
            recipes = [recipe(client_id) for client_id in ids]
            measured = runtime.evaluate(recipes, ids, parts=("test",), **options)
            result.pools[pool] = client_table(data, ids, measured)
    bar.advance()
    return result


def fixed_recipe(runtime: ClientRuntime, beta: float, rate: float) -> Recipe:
    """The same beta and rate for every client and layer."""
    recipe = FixedRecipe.fitting(runtime.model, beta=beta, rate=rate)
    return lambda client_id: recipe(runtime.statistics(client_id))


def other_clients(data: FederatedDataModule, seed: int, number: int) -> dict[int, int]:
    """For each client another one of its pool, whose statistics the nets then read in shuffle `number`."""
    others: dict[int, int] = {}
    for pool in POOLS:
        ids = data.pool(pool)
        if len(ids) > 1:
            order = derangement(len(ids), derive_seed(seed, "shuffle", pool, number))
            others |= {client_id: ids[order[position]] for position, client_id in enumerate(ids)}
        else:
            others |= {client_id: client_id for client_id in ids}
    return others
