"""From the configuration to objects: the only place, beside the command line, that knows its keys."""

import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp
from lightning.fabric import Fabric
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from fedl2p.core.batchnorm import batchnorm_names, convert_batchnorm
from fedl2p.core.episode import Episode
from fedl2p.core.functional import FunctionalModel, expected_error
from fedl2p.core.hypergradients import ESTIMATORS, HypergradientEstimator
from fedl2p.core.learner import Learner
from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.statistics import learnable_layer_names
from fedl2p.datamodules.base.federated import FederatedDataModule
from fedl2p.errors import ConfigError, DataError, FedL2PError, ModelError
from fedl2p.experiment.config import from_yaml, to_yaml, trainer_only
from fedl2p.experiment.folder import RunFolder
from fedl2p.experiment.schema import ComponentConfig, Config, ValidationLoss
from fedl2p.federation.client_app import add_identity_handler, add_meta_handlers
from fedl2p.federation.fedavg import add_pretrain_handler
from fedl2p.federation.runtime import ClientRuntime, quiet_trainer
from fedl2p.io import load_tensors
from fedl2p.pretraining.fedavg import LocalTraining
from fedl2p.seeding import derive_seed

GLOBAL_MODEL = "global_model.safetensors"  # in a run's folder


def import_object(path: str, key: str) -> Any:
    """Imports the class or function `package.module.name`.

    Class paths that begin with `datamodules.` or `callbacks.` are also looked up below `fedl2p.`, where those packages
    are installed; a package of that name of the user's own comes first.

    Args:
        path: the import path; any module that Python finds, also outside this project.
        key: the configuration key, for the error.

    Raises:
        ConfigError: there is no such module, or no such class or function in it.
    """
    try:
        found = _imported(path)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        found = _imported_from_ours(path)
        if found is None:
            raise ConfigError(f"{key} '{path}' cannot be imported: {error}.") from error
    if not callable(found):
        raise ConfigError(
            f"{key} is '{path}'; allowed is the import path of a class or function, as package.module.Name."
        )
    return found


def _imported(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module_name), name) if module_name else None


def _imported_from_ours(path: str) -> Any:
    if path.partition(".")[0] not in ("datamodules", "callbacks"):
        return None
    try:
        return _imported(f"fedl2p.{path}")
    except (ImportError, AttributeError):
        return None


def instantiate(component: ComponentConfig, key: str, *, kind: type) -> Any:
    """Makes an object from a class path and its arguments, which are plain keyword arguments.

    A function that makes such objects will do too, as `torchvision.models.resnet18` or `timm.create_model`.

    Raises:
        ConfigError: not such a class or function, an unknown or missing argument, or a value that it refuses.
    """
    path = component.class_path
    found = import_object(path, f"{key}.class_path")
    if isinstance(found, type) and not issubclass(found, kind):
        raise ConfigError(f"{key}.class_path is '{path}'; allowed is a subclass of {kind.__name__}.")
    made = call(found, component.init_args, f"{key}.init_args")
    if not isinstance(made, kind):
        raise ConfigError(f"{key}.class_path is '{path}', which makes a {type(made).__name__}, not a {kind.__name__}.")
    return made


def call(function: Any, arguments: dict[str, Any], key: str) -> Any:
    """Calls with keyword arguments from the configuration; what it refuses becomes a ConfigError that names the key."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in arguments if name not in parameters]
    if unknown and not takes_any:
        raise ConfigError(f"Unknown key '{key}.{unknown[0]}'; known there are {', '.join(parameters)}.")
    try:
        return function(**arguments)
    except (
        FedL2PError,
        MisconfigurationException,
        ArithmeticError,
        OSError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ConfigError(f"{key}: {e}" + (f" (given {given})" if given else "")) from e


def build_data(config: Config) -> FederatedDataModule:
    """The federation's data, set up.

    Raises:
        ConfigError: the class or its arguments are wrong, or the data cannot be split as asked.
    """
    data: FederatedDataModule = instantiate(config.data, "data", kind=FederatedDataModule)
    try:
        data.prepare_data()
        data.setup()
        data.check()
        seen = len(data.pool("seen"))
    except DataError as error:
        raise ConfigError(f"data.init_args: {error}") from error
    if config.pretraining.weights is None and config.pretraining.rounds and not data.pool(config.pretraining.pool):
        raise ConfigError(
            "The data have no clients in the pool 'pretrain'; give pretraining.weights a file, set pretraining.pool to "
            "seen, or set pretraining.rounds to 0 where the model brings its own weights."
        )
    if config.federation.client_fraction * seen < 0.5:
        raise ConfigError(
            f"federation.client_fraction is {config.federation.client_fraction}, less than one of {seen} seen clients; "
            f"allowed is {1 / seen:.3g} or more."
        )
    return data


def build_model(config: Config) -> nn.Module:
    """The global model before pretraining, its initial weights from the seed.

    Raises:
        ConfigError: the class or its arguments are wrong, or its batch norms cannot be mixed.
    """
    torch.manual_seed(derive_seed(config.seed, "model"))
    model: nn.Module = instantiate(config.model, "model", kind=nn.Module)
    try:
        convert_batchnorm(model)
    except (FedL2PError, LookupError) as error:
        raise ConfigError(f"model: {error}") from error
    return model.double() if str(config.trainer.get("precision")).startswith("64") else model


def check_model(config: Config, data: FederatedDataModule, model: nn.Module) -> None:
    """A batch through the model and one hypergradient, so that what cannot work is found before anything is written.

    Raises:
        ConfigError: the model does not take the data, or cannot be differentiated as the estimator needs.
    """
    reference = next(model.parameters(), torch.zeros(()))
    inputs = reference.detach().new_zeros((2, *data.input_shape))
    try:
        with torch.no_grad():
            outputs = model.eval()(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, ModelError) as error:
        raise ConfigError(f"model: it does not take inputs of shape {data.input_shape}: {error}") from error
    if outputs.shape != (2, data.num_classes):
        raise ConfigError(
            f"model: it answers with the shape {tuple(outputs.shape[1:])}; the data have {data.num_classes} classes."
        )
    converted = convert_batchnorm(model).requires_grad_(False)
    learner = Learner(
        FunctionalModel.of(converted), MetaNets(converted).to(reference), estimator=build_estimator(config)
    )
    batch = inputs, torch.zeros(2, dtype=torch.int64)
    xi, moments = len(batchnorm_names(converted)), 2 * len(learnable_layer_names(converted))
    net_inputs = inputs.new_zeros(xi), inputs.new_zeros(moments), inputs.new_ones(())
    episode = Episode(net_inputs, {}, [batch], [batch], loss_batch=batch)
    # As do large networks, and clients who find no other of their size; and as a cohort.
    cohorts = (1,) if config.federation.cohort_size == 1 else (1, 2)
    try:
        for clients in cohorts:
            learner.meta_update([learner.lambda_()] * clients, [[episode] * clients])
    except RuntimeError as error:
        raise ConfigError(
            f"model: a hypergradient by {config.hypergradient.name!r} cannot pass it: {error}. Second derivatives are "
            "not needed by hypergradient.name=fomaml, and torch.vmap not by federation.cohort_size=1."
        ) from error


def build_estimator(config: Config) -> HypergradientEstimator:
    """The estimator of the hypergradient.

    Raises:
        ConfigError: unknown arguments, or values that it refuses.
    """
    estimator = ESTIMATORS[config.hypergradient.name]
    found: HypergradientEstimator = call(estimator, config.hypergradient.init_args, "hypergradient.init_args")
    return found


def check_trainer(config: Config) -> None:
    """Refuses keys and values that the Lightning Trainer does not take, and several devices for one client.

    Raises:
        ConfigError: naming `trainer.<key>`.
    """
    trainer = call(lambda **arguments: quiet_trainer(arguments), _known_trainer_keys(config.trainer), "trainer")
    if trainer.world_size > 1:
        raise ConfigError(
            f"trainer.devices is {config.trainer.get('devices')!r}; allowed in a federation is one device a client "
            "(federation.engine=ray spreads clients over many). Several for one client are for a Trainer of your own."
        )


def _known_trainer_keys(arguments: dict[str, Any]) -> dict[str, Any]:
    import lightning as L

    known = inspect.signature(L.Trainer.__init__).parameters
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ConfigError(f"Unknown key 'trainer.{unknown[0]}'; known there are the arguments of lightning.Trainer.")
    return arguments


def cohort_size(config: Config) -> int | None:
    """How many clients are stacked at most; None is automatic, 1 where each needs a Trainer."""
    if config.federation.cohort_size != "auto":
        return int(config.federation.cohort_size)
    return 1 if trainer_only(config.trainer) else None


def build_fabric(config: Config) -> Fabric:
    """The device and the precision of all that clients do, as a Lightning Trainer would take them.

    Half precision on a CPU is bfloat16 in any case, as in a Trainer.

    Raises:
        ConfigError: the machine has no such device.
    """
    devices = config.trainer.get("devices", "auto")
    settings = {
        "accelerator": config.trainer.get("accelerator", "cpu"),
        "devices": 1 if devices == "auto" else devices,
    }
    fabric: Fabric = call(Fabric, settings, "trainer")
    precision = str(config.trainer.get("precision", "32"))
    if not precision.endswith("-mixed"):
        return fabric
    precision = "bf16-mixed" if fabric.device.type == "cpu" else precision
    half: Fabric = call(Fabric, settings | {"precision": precision}, "trainer")
    return half


def trainer_notice(config: Config) -> str | None:
    """One line for the user where each client learns in a Trainer of its own; None where none does."""
    keys = trainer_only(config.trainer)
    if not keys:
        return None
    names = ", ".join(f"trainer.{key}" for key in keys)
    return f"{names}: only a Trainer follows this, so each client learns in one of its own, which is slower."


def build_training(config: Config, data: FederatedDataModule, model: nn.Module) -> LocalTraining:
    """The clients' side of FedAvg."""
    settings, fabric = config.pretraining, build_fabric(config)
    data.to(fabric.device)
    return LocalTraining(
        data,
        model,
        epochs=settings.epochs,
        lr=settings.lr,
        momentum=settings.momentum,
        fabric=fabric,
        seed=config.seed,
    )


def build_remote_app(config: Config, folder: Path) -> ClientApp:
    """The app of clients in other processes, which build data, model and nets anew, once a process.

    Args:
        config: of the run.
        folder: the run's, where those processes find theta_g, and keep statistics.
    """
    app = ClientApp()
    key = to_yaml(config), str(folder.absolute())
    add_identity_handler(app)
    add_pretrain_handler(app, lambda: _remote_training(*key))
    add_meta_handlers(app, lambda: _remote_runtime(*key))
    return app


# An app comes anew with each message, so what its process has built is kept here.


@functools.cache
def _remote_data(config_yaml: str, folder: str) -> tuple[Config, FederatedDataModule]:
    config = from_yaml(config_yaml)
    torch.set_num_threads(config.threads or 1)
    data = build_data(config)
    RunFolder(folder).require_same_data(data.fingerprint())
    return config, data


@functools.cache
def _remote_training(config_yaml: str, folder: str) -> LocalTraining:
    config, data = _remote_data(config_yaml, folder)
    return build_training(config, data, build_model(config))


@functools.cache
def _remote_runtime(config_yaml: str, folder: str) -> ClientRuntime:
    config, data = _remote_data(config_yaml, folder)
    model = build_model(config)
    model.load_state_dict(load_tensors(Path(folder) / GLOBAL_MODEL))
    return build_runtime(config, data, model, base_lr=0.0, statistics_folder=Path(folder) / "statistics")


def build_runtime(
    config: Config,
    data: FederatedDataModule,
    model: nn.Module,
    *,
    base_lr: float,
    statistics_folder: Path | None = None,
) -> ClientRuntime:
    """The clients' side, with new nets.

    Args:
        config: of the run.
        data: set up.
        model: theta_g, pretrained, not converted.
        base_lr: initial eta~.
        statistics_folder: see `ClientRuntime`.
    """
    converted = convert_batchnorm(model)
    torch.manual_seed(derive_seed(config.seed, "meta_nets"))
    meta_nets = MetaNets(
        converted,
        base_lr=base_lr,
        initialization=config.meta_nets.initialization,
        log_divergence=config.meta_nets.log_divergence,
        initial_beta=config.meta_nets.initial_beta,
        sample_count=config.meta_nets.sample_count,
    ).to(next(converted.parameters()).dtype)
    return ClientRuntime(
        data,
        converted,
        meta_nets,
        estimator=build_estimator(config),
        settings=config.client,
        val_loss_fn=expected_error if config.client.validation_loss is ValidationLoss.expected_error else None,
        cohort_size=cohort_size(config),
        fabric=build_fabric(config),
        compile=config.client.compile,
        seed=config.seed,
        limits={part: config.trainer.get(f"limit_{part}_batches") for part in ("train", "val", "test")},
        trainer=_trainer_arguments(config),
        statistics_folder=statistics_folder,
    )


def _trainer_arguments(config: Config) -> dict[str, Any] | None:
    """Of the Trainer that each client needs; None where none does. Its batches are limited before it gets them."""
    if not trainer_only(config.trainer):
        return None
    return {key: value for key, value in config.trainer.items() if not key.startswith("limit_")}
