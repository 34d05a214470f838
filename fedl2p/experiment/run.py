"""The main job from end to end, from Python or by `fedl2p run`: its stages in order, and what is written and shown."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from torch import nn

from fedl2p.callbacks.wandb_rounds import WandbRounds, start_wandb
from fedl2p.errors import FedL2PError
from fedl2p.experiment.build import GLOBAL_MODEL, build_runtime
from fedl2p.experiment.config import Source, load_config, to_yaml
from fedl2p.experiment.context import RunContext, prepare
from fedl2p.experiment.cost import run_cost
from fedl2p.experiment.evaluation import POOLS, measured_methods
from fedl2p.experiment.folder import DATA
from fedl2p.experiment.methods import TunedRate, best_fine_tuning
from fedl2p.experiment.recommendation import recommendation
from fedl2p.experiment.record import client_record, net_input_rows
from fedl2p.experiment.results import MethodResult, compare, versions
from fedl2p.experiment.stages import (
    initial_base_lr,
    initial_lambda,
    learned_state,
    local_policies,
    pretrained_model,
    tuned_rates,
)
from fedl2p.federation.checkpoint import FILE_NAME as ROUNDS
from fedl2p.federation.local import flower_run
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.federation.state import MetaState, RoundCallback
from fedl2p.report.hyperparameters import hyperparameter_rows, write_hyperparameters
from fedl2p.report.page import write_report
from fedl2p.report.table import methods_table

Result = TypeVar("Result")

WANDB = "checkpoints/wandb.json"
"""The id of the W&B run."""


def run(*sources: Source, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Runs the main job, writes the run's folder, and prints the table of methods and the folder's path.

        results = fedl2p.run("configs/digits.yaml", "seed=7", {"federation": {"rounds": 20}})

    Args:
        sources: paths of YAML files, `key=value` pairs, dictionaries and configurations; later ones win.
        resume: go on with the run in `output_dir`.
        quiet: show neither progress nor the table.

    Returns:
        What `results.json` holds.

    Raises:
        ConfigError: the configuration is wrong; nothing was written.
        RunFolderError: the folder cannot be used or written; what it held is as it was.
        FederationError: the rounds cannot go on.
    """
    started = time.monotonic()
    context = prepare(load_config(sources), resume=resume, console=Console(stderr=True, quiet=quiet))
    with context.folder.opened(to_yaml(context.config), resume=resume):
        tracker = _tracker(context)
        try:
            outcome = run_stages(context, [tracker] if tracker else [])
            results = collect(context, outcome)
            _write_results(context, outcome, results, started, tracker)
        except BaseException:
            _leave_page(context.folder.path)
            raise
        finally:
            if tracker:
                tracker.finish()
    if not quiet:
        console = Console()
        console.print(methods_table(results))
        if outcome.recommended:
            name = results["methods"][outcome.recommended["method"]]["label"]
            line = f"Lowest validation loss on the seen clients (refined: on the half left out): {name}"
            console.print(line, soft_wrap=True, highlight=False)
        console.print(f"{context.folder.path}", soft_wrap=True, highlight=False)
    return results


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the stages came to.

    Attributes:
        model: theta_g.
        runtime: the clients.
        start: lambda before the first round, by name.
        state: of the rounds.
        methods: what was compared, by key.
        rates: of the hand-made methods.
        recommended: see `recommendation`.
        timings: seconds by stage.
    """

    model: nn.Module
    runtime: ClientRuntime
    start: dict[str, Any]
    state: MetaState
    methods: dict[str, MethodResult]
    rates: dict[str, TunedRate]
    recommended: dict[str, Any] | None
    timings: dict[str, float]


def run_stages(context: RunContext, callbacks: Sequence[RoundCallback] = ()) -> Outcome:
    """Runs the stages in order; what a resumed run has done already is read from the file beside the stage.

    Args:
        context: from `prepare`; its folder is open.
        callbacks: look on at the rounds.
    """
    folder, timings = context.folder.path, dict[str, float]()

    def stage(name: str, work: Callable[..., Result], *arguments: Any) -> Result:
        began = time.monotonic()
        result = work(context, *arguments)
        timings[name] = time.monotonic() - began
        return result

    context.folder.write_json(DATA, context.fingerprint)
    context.folder.write_json("clients.json", client_record(context.data))
    with flower_run():
        model = stage("pretraining", pretrained_model, folder / GLOBAL_MODEL)
        runtime = build_runtime(context.config, context.data, model, base_lr=0.0)
        rates = stage("tuning", tuned_rates, folder / "checkpoints" / "tuning.json", runtime)
        base_lr = initial_base_lr(context, rates)
        start = initial_lambda(runtime, base_lr)
        state = stage("rounds", learned_state, folder / "checkpoints" / ROUNDS, runtime, base_lr, callbacks)
        local = stage("l2p", local_policies, folder / "checkpoints" / "l2p.safetensors", runtime, start, state)
        methods = stage("evaluation", measured_methods, runtime, rates, base_lr, start, state, local)
        advice = stage("recommendation", recommendation, runtime, rates, state)
    return Outcome(model, runtime, start, state, methods, rates, advice, timings)


def collect(context: RunContext, outcome: Outcome) -> dict[str, Any]:
    """The content of `results.json`."""
    state, history, runtime = outcome.state, outcome.state.history, outcome.runtime
    return {
        "seed": context.config.seed,
        "config": asdict(context.config),
        "versions": versions(),
        "timings": dict(outcome.timings),
        "cohort_sizes": runtime.cohort_size or runtime.automatic_sizes,
        "rounds": {
            "best": state.best_round,
            "last": state.round,
            "best_val_loss": state.best_loss,
            "first_val_loss": history[0].val_loss,
            "val_losses": [record.val_loss for record in history],
            "failures": sum(len(record.failures) for record in history),
            "skipped_steps": sum(record.skipped_steps for record in history),
        },
        "methods": {name: method.as_dict() for name, method in outcome.methods.items()},
        "recommended": outcome.recommended,
        "comparisons": compare(outcome.methods, seed=context.config.seed, best=best_fine_tuning(outcome.rates)),
        "cost": run_cost(context.config, context.data, runtime, state),
    }


def _write_results(
    context: RunContext, outcome: Outcome, results: dict[str, Any], started: float, tracker: WandbRounds | None
) -> None:
    """The files for people and programs; `results.json` first, since the others only show it."""
    folder, rows = context.folder.path, _hyperparameters(context, outcome)
    context.folder.write_json("results.json", results)
    write_hyperparameters(folder / "hyperparameters.csv", rows)
    write_hyperparameters(folder / "net_inputs.csv", _net_inputs(context, outcome))
    results["timings"]["total"] = time.monotonic() - started
    context.folder.write_json("results.json", results)
    write_report([folder])
    if tracker:
        tracker.log_hyperparameters(rows)
        tracker.log_results(results)


def _hyperparameters(context: RunContext, outcome: Outcome) -> list[dict[str, Any]]:
    ids = [client_id for pool in POOLS for client_id in context.data.pool(pool)]
    runtime, best = outcome.runtime, outcome.state.best_lambda
    recipes = [runtime.recipe(best, client_id) for client_id in ids]
    return hyperparameter_rows([context.data.clients[i] for i in ids], recipes, runtime.meta_nets)


def _net_inputs(context: RunContext, outcome: Outcome) -> list[dict[str, Any]]:
    ids = [client_id for pool in POOLS for client_id in context.data.pool(pool)]
    statistics = [outcome.runtime.statistics(client_id) for client_id in ids]
    return net_input_rows([context.data.clients[i] for i in ids], statistics, outcome.runtime.meta_nets)


def _leave_page(folder: Path) -> None:
    """An interrupted run has a page too, of what it has written; why it stopped matters more than why it has none."""
    with suppress(FedL2PError):
        write_report([folder])


def _tracker(context: RunContext) -> WandbRounds | None:
    """W&B, if it is wanted and starts; it never stops a run."""
    config, folder = context.config, context.folder
    if not config.wandb.enabled:
        return None
    try:
        run = start_wandb(
            project=config.wandb.project,
            name=config.wandb.name or folder.path.name,
            directory=folder.path,
            config=asdict(config),
            mode=config.wandb.mode,
            run_id=folder.read_json(WANDB),
        )
    except Exception as error:  # of a library that talks to a server
        context.warn(f"W&B did not start ({type(error).__name__}: {error}); the run goes on without it.")
        return None
    folder.write_json(WANDB, run.id)
    return WandbRounds(run=run, warn=context.warn)
