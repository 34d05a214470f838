"""What every stage of a run looks at: made and checked once, before anything is written, and never changed."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from flwr.serverapp import Grid
from rich.console import Console
from torch import nn

from fedl2p.errors import ConfigError, ModelError
from fedl2p.experiment.build import (
    build_data,
    build_model,
    build_remote_app,
    check_model,
    check_trainer,
    trainer_notice,
)
from fedl2p.experiment.config import to_yaml
from fedl2p.experiment.folder import RunFolder
from fedl2p.experiment.methods import given_rates, tuned_methods
from fedl2p.experiment.schema import Config
from fedl2p.federation.local import LocalGrid
from fedl2p.federation.ray import require_ray, simulate
from fedl2p.models.weights import load_weights
from fedl2p.progress import ProgressBar

if TYPE_CHECKING:
    from fedl2p.datamodules.base.federated import FederatedDataModule

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class RunContext:
    """One run of the main job.

    Attributes:
        config: of the run.
        folder: where it goes.
        data: the federation's data, set up.
        model: the global model before pretraining, or with the weights of `pretraining.weights`.
        console: for progress and warnings.
        resume: whether the folder holds a run that is to go on.
        fingerprint: a hash of every client's data, by the client's name.
    """

    config: Config
    folder: RunFolder
    data: "FederatedDataModule"
    model: nn.Module
    console: Console
    resume: bool
    fingerprint: dict[str, str]

    def bar(self, description: str, total: int, done: int = 0) -> ProgressBar:
        """A progress bar; where none can be drawn, one line when the job begins."""
        return ProgressBar(description, total, done=done, console=self.console, announce=True)

    def warn(self, text: str) -> None:
        """Prints one line."""
        self.console.print(f"Warning: {' '.join(text.split())}", markup=False, highlight=False, soft_wrap=True)

    def on_grid(self, work: Callable[[Grid], Result], local: Callable[[], LocalGrid]) -> Result:
        """Does the server's work on the engine that is configured.

        Args:
            work: is given the grid.
            local: makes the grid of engine `local`.
        """
        settings = self.config.federation
        if settings.engine == "local":
            return work(local())
        return simulate(
            build_remote_app(self.config, self.folder.path),
            work,
            num_clients=len(self.data.clients),
            num_cpus=settings.ray.num_cpus,
            num_gpus=settings.ray.num_gpus,
        )


def prepare(config: Config, *, resume: bool = False, console: Console | None = None) -> RunContext:
    """Builds and checks everything that can fail for a wrong configuration; nothing is written.

    Args:
        config: from `load_config`.
        resume: go on with the run in `config.output_dir`.
        console: for progress; standard error if None.

    Raises:
        ConfigError: a component is wrong.
        RunFolderError: the folder cannot be used, or the run in it had another configuration or other data.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = RunFolder(config.output_dir)
    folder.require_usable(resume=resume)
    if resume:
        folder.require_same(to_yaml(config))
    check_trainer(config)
    if not config.baselines.tune:
        given_rates(config.baselines.tuned_rates, tuned_methods(config))
    if config.federation.engine == "ray":
        require_ray()
    data = build_data(config)
    model = build_model(config)
    if config.pretraining.weights is not None:
        model = with_weights(model, Path(config.pretraining.weights), "pretraining.weights")
    check_model(config, data, model)
    context = RunContext(
        config=config,
        folder=folder,
        data=data,
        model=model,
        console=console or Console(stderr=True),
        resume=resume,
        fingerprint=data.fingerprint(),
    )
    folder.require_same_data(context.fingerprint)
    notice = trainer_notice(config)
    if notice is not None:
        context.warn(notice)
    return context


def with_weights(model: nn.Module, path: Path, key: str) -> nn.Module:
    """A copy of a model with the weights of a file.

    Raises:
        ConfigError: they do not fit, or cannot be read; `key` says where the path comes from.
    """
    model = copy.deepcopy(model)
    try:
        load_weights(model, path)
    except ModelError as error:
        raise ConfigError(f"{key}: {error}") from error
    return model
