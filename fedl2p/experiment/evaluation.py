"""The last stage: every method on the test data of the pools that it is for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedl2p.core.episode import Episode
from fedl2p.core.functional import Tensors
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import BatchNormMode, RefinementSettings
from fedl2p.experiment.context import RunContext
from fedl2p.experiment.methods import FINE_TUNING, TunedRate, derangement, tuned_methods
from fedl2p.experiment.recipes import Recipe, fixed_recipe, hand_made, mean_recipe
from fedl2p.experiment.results import MethodResult, client_table, mean_of
from fedl2p.experiment.schema import Config
from fedl2p.experiment.stages import LocalPolicies, weighted_loss
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.federation.state import MetaState
from fedl2p.pools import MEASURED_POOLS as POOLS
from fedl2p.progress import ProgressBar
from fedl2p.seeding import derive_seed

SHUFFLES = 5  # one alone says little: a few clients can get statistics that suit them by chance
BOUND_STEPS = 10  # of the oracle


def evaluations(config: Config) -> int:
    """How many times the clients are personalized and tested."""
    baselines, refined = config.baselines, config.refinement.steps > 0
    once = 3 + baselines.l2p + baselines.oracle + (refined and baselines.refined)  # global, FT (BN G), first nets
    twice = 5 + baselines.auto_rgn + refined  # FT (BN C), FT (BN I), FT at initial_beta, mean recipe, FedL2P
    return once + 2 * twice + SHUFFLES * baselines.shuffled


def hypergradients(config: Config) -> int:
    """How many hypergradients each client takes, seen or unseen, while methods are refined."""
    steps, baselines = config.refinement.steps, config.baselines
    return (steps + 1) * (1 + baselines.refined) * (steps > 0) + (BOUND_STEPS + 1) * baselines.oracle


@dataclass(frozen=True, eq=False)
class Testing:
    """The methods that were tested so far, by key, and what tests them.

    Attributes:
        context: of the run.
        runtime: the clients.
        bar: advances with each test of all clients.
        methods: the results, in the order of the table.
    """

    context: RunContext
    runtime: ClientRuntime
    bar: ProgressBar
    methods: dict[str, MethodResult] = field(default_factory=dict)

    @property
    def bn_mode(self) -> BatchNormMode:
        """What methods are tested with that do not say otherwise."""
        return self.runtime.settings.evaluation_statistics

    def measure(
        self,
        label: str,
        recipe: Recipe,
        *,
        pools: Sequence[str] = POOLS,
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> MethodResult:
        """One method on its pools; `options` are those of `ClientRuntime.evaluate`."""
        result = MethodResult(label, dict(settings or {}), {})
        for pool in pools:
            ids = self.context.data.pool(pool)
            if ids:
                recipes = [recipe(client_id) for client_id in ids]
                measured = self.runtime.evaluate(recipes, ids, parts=("test",), **options)
                result.pools[pool] = client_table(self.context.data, ids, measured)
        self.bar.advance()
        return result

    def add(self, key: str, label: str, recipe: Recipe, **options: Any) -> None:
        """Tests a method, see `measure`."""
        self.methods[key] = self.measure(label, recipe, **options)

    def add_both(
        self, key: str, label: str, recipe: Recipe, *, bn_mode: BatchNormMode | None = None, **options: Any
    ) -> None:
        """Tests a method as it is meant to be, and with the other batch-norm statistics: `key_running`, `key_batch`.

        A served model has running statistics, those of a batch need many test samples at once; so the table always
        has a row with each. Without batch norm there is one row.
        """
        bn_mode = bn_mode or self.bn_mode
        self.add(key, label, recipe, bn_mode=bn_mode, **options)
        other = BatchNormMode.batch if bn_mode == BatchNormMode.running else BatchNormMode.running
        if self.runtime.model.batchnorm_names:
            self.add(f"{key}_{other}", f"{label}, {other}", recipe, bn_mode=other, **options)
        else:
            self.bar.advance()


def measured_methods(
    context: RunContext,
    runtime: ClientRuntime,
    rates: dict[str, TunedRate],
    base_lr: float,
    start: Tensors,
    state: MetaState,
    local: LocalPolicies | None,
) -> dict[str, MethodResult]:
    """Stage 5: the global model, the baselines, L2P, FedL2P, its controls, and refined recipes.

    Args:
        context: of the run.
        runtime: the clients.
        rates: of the hand-made recipes.
        base_lr: eta~ before the first round.
        start: lambda before the first round.
        state: of the rounds, with the best lambda.
        local: of L2P; None leaves it out.
    """
    number = hypergradients(context.config)
    label = f"Testing all methods ({number} hypergradients a client)" if number else "Testing all methods"
    with context.bar(label, evaluations(context.config)) as bar:
        testing = Testing(context, runtime, bar)
        _hand_made(testing, rates, base_lr)
        if local is not None:
            lambdas = local.lambdas
            settings = {"meta_iterations": local.calls * context.config.client.meta_iterations}
            testing.add("l2p", "L2P", lambda i: runtime.recipe(lambdas[i], i), pools=("seen",), settings=settings)
        _learned(testing, base_lr, start, state)
        _refined(testing, rates, state.best_lambda)
    return testing.methods


def _hand_made(testing: Testing, rates: dict[str, TunedRate], base_lr: float) -> None:
    """Nothing done at all, fine-tuning with tuned rates, and with what the nets start from."""
    runtime, config = testing.runtime, testing.context.config
    nothing = fixed_recipe(runtime, 0.0, 0.0)
    testing.add("global", "Global model", nothing, finetune=False, bn_mode=BatchNormMode.running)
    for name, method in tuned_methods(config).items():
        recipe, settings = hand_made(runtime, method)(rates[name].rate), rates[name].as_dict()
        if method.beta == 0:  # statistics of the client are not looked at
            testing.add(name, method.label, recipe, bn_mode=method.bn_mode, settings=settings)
        else:
            testing.add_both(name, method.label, recipe, bn_mode=method.bn_mode, settings=settings)
    beta = config.meta_nets.initial_beta
    settings = {"beta": beta, "rate": base_lr}
    testing.add_both("ft_initial_beta", f"FT (beta {beta:g})", fixed_recipe(runtime, beta, base_lr), settings=settings)


def _learned(testing: Testing, base_lr: float, start: Tensors, state: MetaState) -> None:
    """FedL2P, beside what shows what its nets are worth: themselves untrained, one recipe for all, a wrong one."""
    runtime, context, best = testing.runtime, testing.context, state.best_lambda
    testing.add("initial_nets", "Nets of round 0", lambda i: runtime.recipe(start, i))
    mean = shared_recipe(context, runtime, best)
    settings = {"recipes": len(context.data.pool("seen")), "beta": mean.beta.tolist(), "eta": mean.eta.tolist()}
    testing.add_both("mean_recipe", "Mean recipe", lambda i: mean, settings=settings)
    settings = {"base_lr": base_lr, "best_round": state.best_round}
    testing.add_both("fedl2p", "FedL2P", lambda i: runtime.recipe(best, i), settings=settings)
    if context.config.baselines.shuffled:
        label, shuffled = "FedL2P, statistics shuffled", []
        for number in range(SHUFFLES):
            others = other_clients(testing, number)
            recipes = {i: runtime.recipe(best, other) for i, other in others.items()}
            shuffled.append(testing.measure(label, recipes.__getitem__))
        testing.methods["fedl2p_shuffled"] = mean_of(shuffled, settings={"shuffles": SHUFFLES})


def shared_recipe(context: RunContext, runtime: ClientRuntime, lambda_: Tensors) -> Hyperparameters:
    """The mean of the recipes that `lambda_` gives the seen clients."""
    return mean_recipe([runtime.recipe(lambda_, client_id) for client_id in context.data.pool("seen")])


def _refined(testing: Testing, rates: dict[str, TunedRate], best: Tensors) -> None:
    """Recipes that each client has bettered on its own validation data; and the bound, on its test data."""
    context, config = testing.context, testing.context.config
    mean = shared_recipe(context, testing.runtime, best)
    if config.refinement.steps:
        recipe, settings = refined_recipe(testing, lambda i: mean, config.refinement)
        testing.add_both("fedl2p_refined", "Mean recipe, refined", recipe, settings=settings)
    if config.refinement.steps and config.baselines.refined:
        name = fine_tuning_like(context, testing.runtime, rates)
        method = FINE_TUNING[name]
        recipe = hand_made(testing.runtime, method)(rates[name].rate)
        recipe, settings = refined_recipe(testing, recipe, config.refinement)
        testing.add("ft_refined", f"{method.label}, refined", recipe, settings=settings | {"rate": rates[name].rate})
    if config.baselines.oracle:
        steps = RefinementSettings(**{**vars(config.refinement), "steps": BOUND_STEPS})
        recipe, settings = refined_recipe(testing, lambda i: mean, steps, parts=("test",), view=on_test_data)
        testing.add("oracle", "Bound: mean recipe, refined on test data", recipe, settings=settings)


def fine_tuning_like(context: RunContext, runtime: ClientRuntime, rates: Mapping[str, TunedRate]) -> str:
    """The fine-tuning with the lowest validation loss of those that are tested with FedL2P's batch-norm statistics."""
    seen = context.data.pool("seen")

    def loss_of(name: str) -> float:
        if not math.isnan(rates[name].val_loss):
            return rates[name].val_loss
        recipe = hand_made(runtime, FINE_TUNING[name])(rates[name].rate)  # a given rate, for which none was measured
        return weighted_loss(runtime, runtime.evaluate([recipe(i) for i in seen], seen), seen)

    own = runtime.settings.evaluation_statistics
    return min((name for name, method in FINE_TUNING.items() if method.bn_mode == own), key=loss_of)


def refined_recipe(
    testing: Testing, recipe: Recipe, settings: RefinementSettings, **options: Any
) -> tuple[Recipe, dict[str, Any]]:
    """Recipes that all clients have refined, and what is said of them; `options` as in `ClientRuntime.refine`."""
    ids = [client_id for pool in POOLS for client_id in testing.context.data.pool(pool)]
    done = testing.runtime.refine([recipe(client_id) for client_id in ids], ids, settings, **options)
    refined = {client_id: one.hyperparameters for client_id, one in zip(ids, done, strict=True)}
    accepted = sum(float(one.accepted.double().mean()) for one in done) / len(done)
    return refined.__getitem__, {"steps": settings.steps, "accepted": accepted}


def on_test_data(episode: Episode) -> Episode:
    """Test data in the place of validation data: for a bound alone."""
    return episode._replace(val_batches=episode.test_batches, test_batches=())


def other_clients(testing: Testing, number: int) -> dict[int, int]:
    """For each client another one of its pool, whose statistics the nets then read in shuffle `number`."""
    others: dict[int, int] = {}
    for pool in POOLS:
        ids = testing.context.data.pool(pool)
        if len(ids) > 1:
            order = derangement(len(ids), derive_seed(testing.context.config.seed, "shuffle", pool, number))
            others |= {client_id: ids[order[position]] for position, client_id in enumerate(ids)}
        else:
            others |= {client_id: client_id for client_id in ids}
    return others
