"""`fedl2p run`: the experiment, W&B beside it, and what is written and shown when it is done."""

import time
from dataclasses import asdict
from typing import Any

from rich.console import Console

from fedl2p.callbacks.wandb_rounds import WandbRounds, start_wandb
from fedl2p.experiment.config import Config
from fedl2p.experiment.results import compare, versions
from fedl2p.experiment.stages import POOLS, Experiment
from fedl2p.report.figures import save_figures
from fedl2p.report.hyperparameters import hyperparameter_rows, write_hyperparameters
from fedl2p.report.page import write_page
from fedl2p.report.table import methods_table


def run_and_report(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Runs the main job, writes the run's folder, and prints the table of methods and the folder's path.

    Args:
        config: from `load_config`.
        resume: go on with the run in `config.output_dir`.

    Returns:
        What `results.json` holds.

    Raises:
        ConfigError: a component of the configuration is wrong; nothing was written.
        RunFolderError: the folder cannot be used; nothing was changed.
        FederationError: the rounds cannot go on.
    """
    started = time.monotonic()
    experiment = Experiment(config, resume=resume)
    tracker = _tracker(config, experiment)
    try:
        experiment.run([tracker] if tracker else [])
        results = collect(experiment)
        rows = _hyperparameters(experiment)
        folder = experiment.folder.path
        experiment.folder.write_json("results.json", results)
        write_hyperparameters(folder / "hyperparameters.csv", rows)
        figures = save_figures(folder / "figures", results=results, history=experiment.state.history, rows=rows)
        results["timings"]["total"] = time.monotonic() - started
        experiment.folder.write_json("results.json", results)
        write_page(folder / "report.html", results, experiment.state.history, figures)
        if tracker:
            tracker.log_hyperparameters(rows)
            tracker.log_results(results)
    finally:
        if tracker:
            tracker.run.finish()
    console = Console()
    console.print(methods_table(results))
    console.print(f"{folder}", soft_wrap=True, highlight=False)
    return results


def collect(experiment: Experiment) -> dict[str, Any]:
    """The content of `results.json`."""
    history, state = experiment.state.history, experiment.state
    return {
        "seed": experiment.config.seed,
        "config": asdict(experiment.config),
        "versions": versions(),
        "timings": dict(experiment.timings),
        "cohort_sizes": experiment.runtime.cohort_size or experiment.runtime.automatic_sizes,
        "rounds": {
            "best": state.best_round,
            "last": state.round,
            "best_val_loss": state.best_loss,
            "first_val_loss": history[0].val_loss,
            "val_losses": [record.val_loss for record in history],
            "failures": sum(len(record.failures) for record in history),
            "skipped_steps": sum(record.skipped_steps for record in history),
        },
        "methods": {name: method.as_dict() for name, method in experiment.methods.items()},
        "comparisons": compare(experiment.methods, seed=experiment.config.seed),
    }


def _hyperparameters(experiment: Experiment) -> list[dict[str, Any]]:
    ids = [client_id for pool in POOLS for client_id in experiment.data.pool(pool)]
    runtime, best = experiment.runtime, experiment.state.best_lambda
    recipes = [runtime.recipe(best, client_id) for client_id in ids]
    return hyperparameter_rows([experiment.data.clients[i] for i in ids], recipes, runtime.meta_nets)


def _tracker(config: Config, experiment: Experiment) -> WandbRounds | None:
    if not config.wandb.enabled:
        return None
    run = start_wandb(
        project=config.wandb.project,
        name=config.wandb.name or experiment.folder.path.name,
        directory=experiment.folder.path,
        config=asdict(config),
        mode=config.wandb.mode,  # type: ignore[arg-type]  # checked by config.check
    )
    return WandbRounds(run=run)
