"""`fedl2p run`: the experiment, W&B beside it, and what is written and shown when it is done."""

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from fedl2p.callbacks.wandb_rounds import WandbRounds, start_wandb
from fedl2p.errors import FedL2PError
from fedl2p.experiment.config import Config
from fedl2p.experiment.cost import compute_cost, peak_memory, traffic
from fedl2p.experiment.record import ClientsFile, net_input_rows
from fedl2p.experiment.results import compare, versions
from fedl2p.experiment.stages import POOLS, Experiment
from fedl2p.report.hyperparameters import hyperparameter_rows, write_hyperparameters
from fedl2p.report.page import write_report
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
    folder = experiment.folder.path
    try:
        experiment.run([ClientsFile(experiment.folder, experiment.data), *([tracker] if tracker else [])])
        results = collect(experiment)
        rows = _hyperparameters(experiment)
        write_hyperparameters(folder / "hyperparameters.csv", rows)
        write_hyperparameters(folder / "net_inputs.csv", _net_inputs(experiment))
        results["timings"]["total"] = time.monotonic() - started
        experiment.folder.write_json("results.json", results)
        if tracker:
            tracker.log_hyperparameters(rows)
            tracker.log_results(results)
        write_report([folder])
    except BaseException:
        _leave_page(folder)
        raise
    finally:
        if tracker:
            tracker.run.finish()
    console = Console()
    console.print(methods_table(results))
    console.print(f"{folder}", soft_wrap=True, highlight=False)
    return results


def _leave_page(folder: Path) -> None:
    """An interrupted run has a page too, of what it has written; why it stopped matters more than why it has none."""
    if (folder / "config.yaml").is_file():
        with suppress(FedL2PError):
            write_report([folder])


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
        "cost": _cost(experiment),
    }


def _cost(experiment: Experiment) -> dict[str, Any]:
    config, runtime, seen = experiment.config, experiment.runtime, len(experiment.data.pool("seen"))
    pretraining, federation = config.pretraining, config.federation
    asked = round(pretraining.client_fraction * len(experiment.data.pool(pretraining.pool)))
    fed_avg = 0 if pretraining.weights is not None else pretraining.rounds * max(1, asked)
    nets, module = runtime.meta_nets, runtime.model.module
    epochs = config.client.finetune_epochs
    return {
        "memory": peak_memory(),
        "parameters": {name: parameter.numel() for name, parameter in module.named_parameters()},
        "flops": compute_cost(module, nets, experiment.data.input_shape, epochs=epochs),
        "bytes": traffic(
            experiment.state.history,
            lambda_=experiment.state.lambda_,
            net_inputs=dict(nets.named_buffers()),
            model=module,
            statistics=len(nets.batchnorm_names) + 2 * len(nets.layer_names),
            seen=seen,
            validation=max(1, round(federation.validation_fraction * seen)),
            pretraining=fed_avg,
        ),
    }


def _net_inputs(experiment: Experiment) -> list[dict[str, Any]]:
    ids = [client_id for pool in POOLS for client_id in experiment.data.pool(pool)]
    statistics = [experiment.runtime.statistics(client_id) for client_id in ids]
    return net_input_rows([experiment.data.clients[i] for i in ids], statistics, experiment.runtime.meta_nets)


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
