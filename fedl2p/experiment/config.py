"""The configuration: a typed schema, files and overrides, and one clear line for whatever is wrong in it.

Nothing heavy is imported here: a typo is reported before torch is loaded.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from fedl2p.errors import ConfigError
from fedl2p.experiment.schema import Config
from fedl2p.experiment.shipped_configs import configuration_path

Source = str | Path | Mapping[str, Any] | Config
"""A part of a configuration: the path of a YAML file, a `key=value` pair, nested keys and values, or a whole one."""


def load_config(arguments: Sequence[Source]) -> Config:
    """Reads files and overrides in order; later ones win.

    Args:
        arguments: paths of YAML files, names of configurations that come with fedl2p, and `key=value` pairs; from
            Python also dictionaries and configurations.

    Returns:
        The resolved, checked configuration.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value has the wrong type or is impossible.
    """
    OmegaConf.register_resolver("now", lambda form: datetime.now().strftime(form), use_cache=True, replace=True)
    if all(_is_override(argument) for argument in arguments):
        raise ConfigError("No configuration file is given; name one, for example digits (`fedl2p configs` lists them).")
    merged = _schema()
    for argument in arguments:
        try:
            part = _part(argument)
            _drop_old_arguments(merged, part)
            merged = OmegaConf.merge(merged, part)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(error, str(argument))) from None
    return check(_resolved(merged))


def _schema() -> Any:
    """The keys and their defaults; sections of frozen dataclasses may be written until they are made."""
    schema = OmegaConf.structured(Config)
    OmegaConf.set_readonly(schema.client, False)
    OmegaConf.set_readonly(schema.client.meta_lr, False)
    OmegaConf.set_readonly(schema.refinement, False)
    return schema


def _is_override(argument: Source) -> bool:
    return isinstance(argument, str) and "=" in argument and not Path(argument).is_file()


def _part(argument: Source) -> DictConfig:
    if isinstance(argument, Config):
        argument = asdict(argument)
    if isinstance(argument, Mapping):
        return OmegaConf.create(dict(argument))
    return _override(str(argument)) if _is_override(argument) else _file(str(argument))


def _drop_old_arguments(merged: Any, part: DictConfig) -> None:
    """Another class has other arguments: what was set for the class before it goes."""
    for key in ("data", "model"):
        section = part.get(key)
        new = section.get("class_path") if isinstance(section, DictConfig) else None
        if new is not None and (OmegaConf.is_missing(merged[key], "class_path") or new != merged[key].class_path):
            merged[key].init_args = {}


def _file(argument: str) -> DictConfig:
    path = configuration_path(argument)
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"The configuration file '{path}' does not exist.") from None
    except Exception as error:  # YAML's errors have no common base in OmegaConf's interface
        raise ConfigError(f"The configuration file '{path}' is not valid YAML: {_one_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"The configuration file '{path}' must hold keys and values, not a list.")
    return content


def _override(argument: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([argument])
    except Exception as error:
        raise ConfigError(f"The override '{argument}' cannot be read: {_one_line(error)}") from None


def _resolved(merged: Any) -> Config:
    try:
        OmegaConf.resolve(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"The key '{missing[0]}' has no value; set it in the file or as {missing[0]}=...")
        # Section by section, since a section that checks itself does not know its own name.
        return Config(**{str(name): _section(merged, str(name)) for name in merged})
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, "the configuration")) from None


def _section(merged: Any, name: str) -> Any:
    section = merged[name]
    try:
        return OmegaConf.to_object(section) if OmegaConf.is_config(section) else section
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None


def _explain(error: OmegaConfBaseException, source: str) -> str:
    """One line that names the key, where it stands, and what would be allowed."""
    message = _one_line(error)
    if isinstance(error, InterpolationResolutionError):
        return f"A ${{...}} in {source} cannot be resolved: {message}."
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or source.partition("=")[0]
    if "expected one of" in message:  # a word of a closed list
        value, _, allowed = message.partition(", expected one of ")
        return f"{key} is {value.removeprefix('Invalid value ')}; allowed is one of {allowed.strip('[]')}."
    if "not in" in message or "Key" in type(error).__name__ or "Attribute" in type(error).__name__:
        known = ", ".join(_siblings(str(key)))
        return f"Unknown key '{key}' in {source}; known there are {known}."
    return f"The key '{key}' in {source} has a value of the wrong type: {message}"


def _siblings(key: str) -> list[str]:
    node: Any = OmegaConf.structured(Config)
    for part in key.split(".")[:-1]:
        node = node[part] if isinstance(node, DictConfig) and part in node else OmegaConf.structured(Config)
    return sorted(str(name) for name in node)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("full_key:")[0].split())


def check(config: Config) -> Config:
    """Refuses impossible values.

    Raises:
        ConfigError: naming the key, the value, and what is allowed.
    """

    def require(condition: bool, key: str, value: Any, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"{key} is {value!r}; allowed is {allowed}.")

    def at_least(key: str, value: float, low: float) -> None:
        require(math.isfinite(value) and value >= low, key, value, f"{low:g} or more")

    def fraction(key: str, value: float) -> None:
        require(0 < value <= 1, key, value, "above 0 and at most 1")

    def one_of(key: str, value: Any, allowed: Sequence[Any]) -> None:
        require(value in allowed, key, value, " or ".join(repr(a) for a in allowed))

    at_least("seed", config.seed, 0)
    at_least("threads", 1 if config.threads is None else config.threads, 1)
    federation, pretraining = config.federation, config.pretraining
    at_least("federation.rounds", federation.rounds, 0)
    at_least("federation.patience", federation.patience, 1)
    one_of("trainer.precision", str(config.trainer.get("precision", "32")), PRECISIONS)
    cohort_size, beyond = federation.cohort_size, trainer_only(config.trainer)
    number = isinstance(cohort_size, int) and not isinstance(cohort_size, bool) and cohort_size >= 1
    require(number or cohort_size == "auto", "federation.cohort_size", cohort_size, "'auto', or 1 or more")
    alone = cohort_size in ("auto", 1) or not beyond
    require(
        alone,
        "federation.cohort_size",
        cohort_size,
        f"1 or 'auto', since trainer.{(beyond or [''])[0]} needs a Trainer",
    )
    fraction("federation.client_fraction", federation.client_fraction)
    fraction("federation.validation_fraction", federation.validation_fraction)
    fraction("federation.min_reply_fraction", federation.min_reply_fraction)
    one_of("federation.engine", federation.engine, ["local", "ray"])
    require(federation.ray.num_cpus > 0, "federation.ray.num_cpus", federation.ray.num_cpus, "above 0")
    at_least("federation.ray.num_gpus", federation.ray.num_gpus, 0)
    one_of("federation.meta_lr_decay", federation.meta_lr_decay, ["none", "cosine"])
    one_of("federation.aggregation", federation.aggregation, ["mean", "median", "trimmed_mean", "krum"])
    norm, ratio = federation.max_update_norm, federation.max_loss_ratio
    positive = isinstance(norm, int | float) and not isinstance(norm, bool) and 0 < norm < math.inf
    require(positive or norm in ("auto", None), "federation.max_update_norm", norm, "above 0, 'auto' or null")
    fraction("federation.max_client_weight", federation.max_client_weight)
    at_least("federation.max_loss_ratio", 1 if ratio is None else ratio, 1)
    one_of("hypergradient.name", config.hypergradient.name, ["unrolled", "fomaml", "ift"])
    one_of("meta_nets.initialization", config.meta_nets.initialization, ["paper", "responsive"])
    beta, base_lr = config.meta_nets.initial_beta, config.meta_nets.base_lr
    require(0 <= beta <= 1, "meta_nets.initial_beta", beta, "0 to 1")
    require(base_lr is None or math.isfinite(base_lr), "meta_nets.base_lr", base_lr, "a finite number or null")
    one_of("pretraining.pool", pretraining.pool, ["pretrain", "seen"])
    at_least("pretraining.rounds", pretraining.rounds, 0)
    fraction("pretraining.client_fraction", pretraining.client_fraction)
    drops = pretraining.lr_drops
    require(all(drop >= 1 for drop in drops), "pretraining.lr_drops", drops, "rounds, from 1")
    at_least("pretraining.epochs", pretraining.epochs, 1)
    require(0 < pretraining.lr < math.inf, "pretraining.lr", pretraining.lr, "above 0")
    require(0 <= pretraining.momentum < 1, "pretraining.momentum", pretraining.momentum, "from 0 to below 1")
    weights = pretraining.weights
    require(weights is None or Path(weights).is_file(), "pretraining.weights", weights, "an existing file, or null")
    rates = config.baselines.rates
    different = len(set(rates)) >= 2 and all(rate > 0 and math.isfinite(rate) for rate in rates)
    require(different, "baselines.rates", rates, "two or more different positive rates")
    tuned = config.baselines.tuned_rates
    positive = all(rate > 0 and math.isfinite(rate) for rate in tuned.values())
    require(positive, "baselines.tuned_rates", tuned, "a positive rate for each method")
    known = config.baselines.tune or base_lr is not None
    require(known, "meta_nets.base_lr", base_lr, "a number where baselines.tune is false, since no rate is measured")
    one_of("wandb.mode", config.wandb.mode, [None, "online", "offline", "disabled"])
    return config


PRECISIONS = ("32", "32-true", "64", "64-true", "bf16-mixed", "16-mixed")
"""The values of `trainer.precision` in a federation."""


def trainer_only(trainer: dict[str, Any]) -> list[str]:
    """The keys of `trainer` that only a Lightning Trainer follows, so that each client needs one."""
    devices = trainer.get("devices", 1)
    followed = {"accelerator", "precision"}
    followed |= (
        {"devices"} if devices in (1, "1", "auto") or (isinstance(devices, list) and len(devices) == 1) else set()
    )
    return [key for key in trainer if not key.startswith("limit_") and key not in followed]


def to_yaml(config: Config) -> str:
    """The configuration as YAML, resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def fingerprint(config: Config) -> str:
    """A hash of all that decides what a run learns: not where it is written or shown, nor how many rounds there are."""
    content = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(content, dict)
    for key in ("output_dir", "wandb", "threads"):
        del content[key]
    del content["federation"]["rounds"]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def from_yaml(text: str) -> Config:
    """What `to_yaml` made of a configuration, again."""
    return _resolved(OmegaConf.merge(_schema(), OmegaConf.create(text)))
