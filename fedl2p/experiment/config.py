"""The configuration: a typed schema, files and overrides, and one clear line for whatever is wrong in it.

Nothing heavy is imported here: a typo is reported before torch is loaded.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from fedl2p.errors import ConfigError


@dataclass
class ComponentConfig:
    """A class by its import path, and its keyword arguments."""

    class_path: str = "???"
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class PretrainingConfig:
    """How theta_g is made: FedAvg on a pool (the paper's CIFAR-10 takes the seen one), or weights from a file."""

    weights: str | None = None
    pool: str = "pretrain"
    rounds: int = 40
    client_fraction: float = 1.0
    epochs: int = 1
    lr: float = 0.1
    lr_drops: list[int] = field(default_factory=list)  # rounds from which on the rate is a tenth
    momentum: float = 0.9


@dataclass
class MetaLearningRates:
    """zeta, a rate for each part of lambda."""

    bn_net: float = 1e-3
    lr_net: float = 1e-3
    base_lr: float = 1e-4


@dataclass
class ClientConfig:
    """The client's side of Algorithm 1."""

    finetune_epochs: int = 15
    meta_iterations: int = 3
    meta_lr: MetaLearningRates = field(default_factory=MetaLearningRates)
    clip_value: float = 1.0
    running_start: str = "measured"
    evaluation_statistics: str = "running"
    validation_loss: str = "cross_entropy"
    compile: bool = False  # inner steps of clients that go one by one; a minute or more a shape; not faster on a CPU


@dataclass
class HypergradientConfig:
    """The estimator and its arguments."""

    name: str = "unrolled"
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class MetaNetsConfig:
    """How the nets are built; a base_lr of null is the best rate of FT (BN C, G, I)."""

    base_lr: float | None = None
    initialization: str = "responsive"
    log_divergence: bool = True
    standardize: bool = True
    initial_beta: float = 0.5
    sample_count: bool = True


@dataclass
class RayConfig:
    """What engine `ray` gives a client that is running; fractions of a GPU are shared."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0


@dataclass
class FederationConfig:
    """The rounds.

    Attributes:
        aggregation: how the clients' updates become one: `mean`, weighted by samples (Algorithm 1), or, where clients
            may lie, `median`, `trimmed_mean` or `krum`.
        max_update_norm: the longest update that a client may send; longer ones are shortened. `auto` is a hundred
            times the median of the round; null is no limit.
        max_client_weight: the largest share of a round that one client can weigh, whatever number of samples it names.
        max_loss_ratio: a round whose validation loss is more than so many times the best one is rolled back; null
            never does.
    """

    rounds: int = 100
    client_fraction: float = 0.1
    patience: int = 100
    engine: str = "local"
    ray: RayConfig = field(default_factory=RayConfig)
    cohort_size: Any = "auto"  # or a number; 1, and auto where trainer needs one, give each client a Trainer
    validation_fraction: float = 1.0
    min_reply_fraction: float = 0.5
    meta_lr_decay: str = "none"
    aggregation: str = "mean"
    max_update_norm: Any = "auto"
    max_client_weight: float = 0.75
    max_loss_ratio: float | None = 10.0


@dataclass
class BaselinesConfig:
    """Which baselines run, and where the search for their rates starts."""

    rates: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3])
    l2p: bool = True
    shuffled: bool = True


@dataclass
class WandbConfig:
    """The W&B run; a mode of null is online where somebody is logged in and offline elsewhere."""

    enabled: bool = True
    project: str = "fedl2p"
    name: str | None = None
    mode: str | None = None


@dataclass
class Config:
    """Everything that a run needs."""

    seed: int = 0
    output_dir: str = "???"
    threads: int | None = None  # of torch on the CPU; null leaves torch's choice
    data: ComponentConfig = field(default_factory=ComponentConfig)
    model: ComponentConfig = field(default_factory=ComponentConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    hypergradient: HypergradientConfig = field(default_factory=HypergradientConfig)
    meta_nets: MetaNetsConfig = field(default_factory=MetaNetsConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def load_config(arguments: Sequence[str]) -> Config:
    """Reads files and overrides in order; later ones win.

    Args:
        arguments: paths of YAML files, and `key=value` pairs.

    Returns:
        The resolved, checked configuration.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value has the wrong type or is impossible.
    """
    OmegaConf.register_resolver("now", lambda form: datetime.now().strftime(form), use_cache=True, replace=True)
    if all(_is_override(argument) for argument in arguments):
        raise ConfigError("No configuration file is given; name one, for example configs/digits.yaml.")
    merged = OmegaConf.structured(Config)
    for argument in arguments:
        part = _override(argument) if _is_override(argument) else _file(argument)
        _drop_old_arguments(merged, part)
        try:
            merged = OmegaConf.merge(merged, part)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(error, argument)) from None
    return check(_resolved(merged))


def _is_override(argument: str) -> bool:
    return "=" in argument and not Path(argument).is_file()


def _drop_old_arguments(merged: Any, part: DictConfig) -> None:
    """Another class has other arguments: what was set for the class before it goes."""
    for key in ("data", "model"):
        section = part.get(key)
        new = section.get("class_path") if isinstance(section, DictConfig) else None
        if new is not None and (OmegaConf.is_missing(merged[key], "class_path") or new != merged[key].class_path):
            merged[key].init_args = {}


def _file(path: str) -> DictConfig:
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
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, "the configuration")) from None
    assert isinstance(config, Config)
    return config


def _explain(error: OmegaConfBaseException, source: str) -> str:
    """One line that names the key, where it stands, and what would be allowed."""
    message = _one_line(error)
    if isinstance(error, InterpolationResolutionError):
        return f"A ${{...}} in {source} cannot be resolved: {message}."
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or source.partition("=")[0]
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
    federation, client, pretraining = config.federation, config.client, config.pretraining
    at_least("federation.rounds", federation.rounds, 0)
    at_least("federation.patience", federation.patience, 1)
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
    at_least("client.finetune_epochs", client.finetune_epochs, 1)
    at_least("client.meta_iterations", client.meta_iterations, 1)
    require(0 < client.clip_value < math.inf, "client.clip_value", client.clip_value, "above 0")
    one_of("client.running_start", client.running_start, ["measured", "zero_one"])
    one_of("client.evaluation_statistics", client.evaluation_statistics, ["running", "batch"])
    one_of("client.validation_loss", client.validation_loss, ["cross_entropy", "expected_error"])
    for group, rate in vars(client.meta_lr).items():
        at_least(f"client.meta_lr.{group}", rate, 0)
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
    one_of("wandb.mode", config.wandb.mode, [None, "online", "offline", "disabled"])
    return config


COHORT_PRECISIONS = {"32": None, "32-true": None, "bf16-mixed": "bfloat16", "16-mixed": "float16"}
"""The values of `trainer.precision` that cohorts follow themselves, and the type of their autocast."""


def trainer_only(trainer: dict[str, Any]) -> list[str]:
    """The keys of `trainer` that only a Lightning Trainer follows, so that clients cannot go in cohorts."""
    devices, precision = trainer.get("devices", 1), str(trainer.get("precision", "32"))
    followed = {"accelerator"}
    followed |= (
        {"devices"} if devices in (1, "1", "auto") or (isinstance(devices, list) and len(devices) == 1) else set()
    )
    followed |= {"precision"} if precision in COHORT_PRECISIONS else set()
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
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    assert isinstance(config, Config)
    return config
