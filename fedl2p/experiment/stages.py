"""The stages of the main job: theta_g, the baselines' rates, the rounds, and L2P.

Each is a function of the context, of the file in which it keeps what it has done, and of results of earlier stages. A
resumed run finds that file and does not do the work again. `run_stages` in `run.py` calls them in order.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.serverapp import Grid
from torch import nn

from fedl2p.callbacks import MetricsFile, RoundProgress
from fedl2p.core.functional import Tensors
from fedl2p.core.learner import Evaluation
from fedl2p.experiment.build import build_training
from fedl2p.experiment.config import fingerprint
from fedl2p.experiment.context import RunContext, with_weights
from fedl2p.experiment.methods import (
    FINE_TUNING,
    NO_RATE_HELPS,
    FineTuning,
    TunedRate,
    given_rates,
    tune_rate,
    tuned_methods,
)
from fedl2p.experiment.recipes import hand_made
from fedl2p.federation.checkpoint import load_state, save_state
from fedl2p.federation.client_app import make_client_app, make_cohort_handlers
from fedl2p.federation.fedavg import make_pretrain_app, pretrain
from fedl2p.federation.local import LocalGrid
from fedl2p.federation.rounds import decayed, new_state, run_rounds, set_up
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.federation.settings import RoundSettings
from fedl2p.federation.state import MetaState, RoundCallback
from fedl2p.io import read_json, read_tensors, write_json, write_tensors
from fedl2p.policy.files import META_NETS, write_policy

SAVE_SECONDS = 30  # between two checkpoints of L2P


def pretrained_model(context: RunContext, file: Path) -> nn.Module:
    """Stage 1: theta_g in evaluation mode, by FedAvg or from `pretraining.weights`.

    Args:
        context: of the run.
        file: theta_g, as soon as it is there.
    """
    settings, pool = context.config.pretraining, context.data.pool(context.config.pretraining.pool)
    if file.exists():
        return with_weights(context.model, file, "the run to resume").eval()
    model = context.model
    if settings.weights is None and settings.rounds and pool:
        with context.bar("Pretraining by FedAvg", settings.rounds) as bar:

            def work(grid: Grid) -> nn.Module:
                return pretrain(
                    grid,
                    context.model,
                    client_ids=pool,
                    rounds=settings.rounds,
                    client_fraction=settings.client_fraction,
                    lr_drops=settings.lr_drops,
                    seed=context.config.seed,
                    on_round=lambda number: bar.advance(),
                )

            training = build_training(context.config, context.data, model)
            model = context.on_grid(work, lambda: LocalGrid(make_pretrain_app(training), pool))
    write_tensors(file, model.state_dict())
    return model.eval()


def tuned_rates(context: RunContext, file: Path, runtime: ClientRuntime) -> dict[str, TunedRate]:
    """Stage 2: the learning rate of each hand-made recipe, by its loss on the seen clients' validation data.

    Args:
        context: of the run.
        file: the rates, by method.
        runtime: the clients.
    """
    settings, seen = context.config.baselines, context.data.pool("seen")
    methods = tuned_methods(context.config)
    if not settings.tune:
        return given_rates(settings.tuned_rates, methods)
    stored = read_json(file)
    if stored is not None:
        return {name: TunedRate.from_dict(values) for name, values in stored.items()}
    with context.bar("Tuning the baselines", len(methods) * len(settings.rates)) as bar:

        def tuned(method: FineTuning) -> TunedRate:
            recipe_of = hand_made(runtime, method)

            def loss_of(rate: float) -> float:
                recipe = recipe_of(rate)
                recipes = [recipe(client_id) for client_id in seen]
                measured = runtime.evaluate(recipes, seen, bn_mode=method.bn_mode)
                bar.advance()
                return weighted_loss(runtime, measured, seen)

            best, losses = tune_rate(loss_of, settings.rates)
            return TunedRate(best, losses[best], tuple(losses.items()), helps=best != min(losses))

        result = {name: tuned(method) for name, method in methods.items()}
    for name, chosen in result.items():
        if not chosen.helps:
            context.warn(f"{methods[name].label}: {NO_RATE_HELPS} ({chosen.rate:g}).")
    write_json(file, {name: chosen.as_dict() for name, chosen in result.items()})
    return result


def weighted_loss(
    runtime: ClientRuntime, measured: Sequence[dict[str, Evaluation]], client_ids: Sequence[int]
) -> float:
    """The mean validation loss of clients, weighted by their training samples, as the rounds weight it."""
    weights = [runtime.statistics(client_id).num_samples for client_id in client_ids]
    return sum(w * m["val"].val_loss for w, m in zip(weights, measured, strict=True)) / sum(weights)


def initial_base_lr(context: RunContext, rates: dict[str, TunedRate]) -> float:
    """The initial eta~: as configured, or the rate of the best fine-tuning that has one rate for all tensors."""
    configured = context.config.meta_nets.base_lr
    if configured is not None:
        return configured
    return min((rates[name] for name in FINE_TUNING), key=lambda chosen: chosen.val_loss).rate


def initial_lambda(runtime: ClientRuntime, base_lr: float) -> Tensors:
    """Lambda before the first round: new nets, and eta~ at one rate."""
    own = runtime.lambda_()
    return own | {"base_lr": torch.full_like(own["base_lr"], base_lr)}


def learned_state(
    context: RunContext,
    file: Path,
    runtime: ClientRuntime,
    base_lr: float,
    callbacks: Sequence[RoundCallback] = (),
) -> MetaState:
    """Stage 3: Algorithm 1. Beside its own file it writes `metrics.jsonl` and the policy.

    Args:
        context: of the run.
        file: the state after the last round that is complete.
        runtime: the clients; its nets are made ready to read them.
        base_lr: what every eta~ starts with.
        callbacks: look on.
    """
    config, path = context.config.federation, context.folder.path
    names = {client_id: context.data.clients[client_id].name for client_id in context.data.pool("seen")}
    settings = RoundSettings(
        rounds=config.rounds,
        patience=config.patience,
        client_fraction=config.client_fraction,
        validation_fraction=config.validation_fraction,
        min_reply_fraction=config.min_reply_fraction,
        meta_lr_decay=config.meta_lr_decay,  # type: ignore[arg-type]  # checked by config.check
        aggregation=config.aggregation,  # type: ignore[arg-type]  # likewise
        max_update_norm=config.max_update_norm,
        max_client_weight=config.max_client_weight,
        max_loss_ratio=config.max_loss_ratio,
        seed=context.config.seed,
    )
    run = fingerprint(context.config)
    stored = load_state(file.parent, run=run, template=runtime.lambda_())
    looking_on = [RoundProgress(console=context.console), MetricsFile(path=path / "metrics.jsonl"), *callbacks]

    def work(grid: Grid) -> MetaState:
        standardize = context.config.meta_nets.standardize
        federation = set_up(grid, runtime.meta_nets, names, settings, base_lr=base_lr, standardize=standardize)
        return run_rounds(
            grid,
            federation,
            stored or new_state(federation),
            callbacks=looking_on,
            save=lambda current: save_state(file.parent, current, run=run),
        )

    app, handlers = make_client_app(runtime), make_cohort_handlers(runtime)
    state = context.on_grid(work, lambda: LocalGrid(app, names, cohort_handlers=handlers))
    write_policy(
        path / META_NETS,
        runtime.meta_nets,
        state.best_lambda,
        settings=context.config.client,
        input_shape=context.data.input_shape,
        recipes=[runtime.recipe(state.best_lambda, client_id) for client_id in names],
    )
    return state


@dataclass(frozen=True, eq=False)
class LocalPolicies:
    """What L2P learned.

    Attributes:
        lambdas: of every seen client, by its id.
        calls: how many times each client ran K iterations.
    """

    lambdas: dict[int, Tensors]
    calls: int


def local_policies(
    context: RunContext, file: Path, runtime: ClientRuntime, start: Tensors, state: MetaState
) -> LocalPolicies | None:
    """Stage 4: every seen client learns a lambda of its own (L2P), with FedL2P's mean number of iterations.

    Args:
        context: of the run.
        file: every client's lambda, and the number of calls that are done.
        runtime: the clients.
        start: lambda before the first iteration.
        state: of the rounds.

    Returns:
        None where `baselines.l2p` is off.
    """
    if not context.config.baselines.l2p:
        return None
    seen, calls = context.data.pool("seen"), mean_calls(context, state)
    done, lambdas = _load_lambdas(file, seen, calls) or (0, dict.fromkeys(seen, start))
    saved = time.monotonic()
    with context.bar("L2P, each client alone", calls, done) as bar:
        for number in range(done + 1, calls + 1):
            updates = runtime.meta_update(
                [lambdas[i] for i in seen],
                seen,
                number,
                phase="l2p",
                meta_lr_scale=decayed(context.config.federation.meta_lr_decay, number, calls),
            )
            lambdas = {i: update.lambda_ for i, update in zip(seen, updates, strict=True)}
            bar.advance()
            if number == calls or time.monotonic() - saved > SAVE_SECONDS:
                flat = {f"{i}/{name}": t for i, own in lambdas.items() for name, t in own.items()}
                write_tensors(file, flat, {"done": str(number), "calls": str(calls)})
                saved = time.monotonic()
    return LocalPolicies(lambdas, calls)


def mean_calls(context: RunContext, state: MetaState) -> int:
    """How many times FedL2P asks a seen client on average; at least once."""
    asked = sum(len(record.clients) for record in state.history)
    return max(1, round(asked / len(context.data.pool("seen"))))


def _load_lambdas(file: Path, client_ids: Sequence[int], calls: int) -> tuple[int, dict[int, Tensors]] | None:
    """The number of calls that are done, and every client's lambda after them; None after fewer rounds than now."""
    if not file.exists():
        return None
    tensors, metadata = read_tensors(file)
    if metadata.get("calls") != str(calls):  # the run was extended, so the rates decay over more calls
        return None
    own: dict[int, Tensors] = {client_id: {} for client_id in client_ids}
    for key, tensor in tensors.items():
        client_id, _, name = key.partition("/")
        own[int(client_id)][name] = tensor
    return int(metadata["done"]), own
