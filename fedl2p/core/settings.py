"""How a client learns and refines: every setting, its default and its bounds. Nothing heavy is imported here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, TypeVar

from fedl2p.errors import ConfigError

Word = TypeVar("Word", bound=StrEnum)


class RunningStart(StrEnum):
    """Where a client's running batch-norm statistics start."""

    measured = "measured"
    """Those of its training data in the pretrained model: exact where beta is 0, near elsewhere."""
    zero_one = "zero_one"
    """Mean 0 and variance 1, as in the authors' code."""


class BatchNormMode(StrEnum):
    """What beta mixes with the pretrained statistics when a model is evaluated."""

    running = "running"
    """The client's running statistics, which a served model has."""
    batch = "batch"
    """Those of the whole set as one batch, as FT (BN I) tests."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def word(kind: type[Word], value: str, key: str) -> Word:
    """A word of a closed list.

    Args:
        kind: the enum of the allowed words.
        value: the word, or a member of `kind`.
        key: what is set, for the error.

    Raises:
        ConfigError: it is none of them.
    """
    try:
        return kind(value)
    except ValueError:
        allowed = " and ".join(f"'{member.value}'" for member in kind)
        raise ConfigError(f"{key} is '{value}'; allowed are {allowed}.") from None


@dataclass(frozen=True)
class MetaLearningRates:
    """A learning rate for each part of lambda (zeta, section 4.1 of the FedL2P paper).

    Attributes:
        bn_net: of BNNet's weights, at least 0.
        lr_net: of LRNet's weights, at least 0.
        base_lr: of the base rates eta~, at least 0.
    """

    bn_net: float = 1e-3
    lr_net: float = 1e-3
    base_lr: float = 1e-4

    def __post_init__(self) -> None:
        """Refuses rates that are negative or not finite."""
        for name, rate in vars(self).items():
            if not _is_number(rate) or rate < 0:
                raise ConfigError(f"meta_lr.{name} is {rate!r}; allowed is 0 or more.")

    def scaled(self, factor: float) -> "MetaLearningRates":
        """All three, multiplied."""
        return MetaLearningRates(**{name: rate * factor for name, rate in vars(self).items()})


@dataclass(frozen=True)
class LearnerSettings:
    """How one client learns and personalizes (Algorithm 1 of the FedL2P paper).

    Attributes:
        finetune_epochs: passes over the training data when a model is fine-tuned (e), at least 0.
        meta_iterations: how often a client updates the nets before it sends them back (K), at least 1.
        meta_lr: learning rates of the nets; a mapping with the same names will do.
        clip_value: every entry of the nets' gradient is clipped to [-clip_value, clip_value]; above 0.
        running_start: where running statistics start, see `RunningStart`.
        evaluation_statistics: what validation and test losses are taken with, see `BatchNormMode`.
    """

    finetune_epochs: int = 15
    meta_iterations: int = 3
    meta_lr: MetaLearningRates = field(default_factory=MetaLearningRates)
    clip_value: float = 1.0
    running_start: RunningStart = RunningStart.measured
    evaluation_statistics: BatchNormMode = BatchNormMode.running

    def __post_init__(self) -> None:
        """Takes plain words and mappings in, and refuses what is impossible.

        Raises:
            ConfigError: naming the setting, its value, and what is allowed.
        """
        for name, least in (("finetune_epochs", 0), ("meta_iterations", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; allowed is a whole number, {least} or more.")
        if not _is_number(self.clip_value) or self.clip_value <= 0:
            raise ConfigError(f"clip_value is {self.clip_value!r}; allowed is above 0.")
        object.__setattr__(self, "meta_lr", _meta_lr(self.meta_lr))
        object.__setattr__(self, "running_start", word(RunningStart, self.running_start, "running_start"))
        bn_mode = word(BatchNormMode, self.evaluation_statistics, "evaluation_statistics")
        object.__setattr__(self, "evaluation_statistics", bn_mode)

    @classmethod
    def of(cls, **values: Any) -> "LearnerSettings":
        """From keyword arguments.

        Raises:
            ConfigError: an unknown name, or an impossible value.
        """
        known = [setting.name for setting in fields(LearnerSettings)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"'{unknown[0]}' is no setting of a client; known are {', '.join(known)}.")
        return LearnerSettings(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which `of` takes again."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(LearnerSettings)}
        words = {name: value.value for name, value in values.items() if isinstance(value, StrEnum)}
        return values | words | {"meta_lr": dict(vars(self.meta_lr))}


@dataclass(frozen=True)
class RefinementSettings:
    """How a client refines its learning rates, in log eta, where a rate moves in proportion to itself.

    Attributes:
        steps: how many steps are tried, at least 0; 0 leaves the recipe as it is. Each costs a fine-tuning with its
            hypergradient.
        step_size: by what the gradient of the validation loss by log eta is multiplied at first, above 0.
        longest_step: no log eta moves further than this in one step, above 0.
        farthest: no log eta ends further than this from where it started, above 0.
    """

    steps: int = 3
    step_size: float = 4.0
    longest_step: float = 0.35
    farthest: float = 1.1

    def __post_init__(self) -> None:
        """Refuses what is impossible.

        Raises:
            ConfigError: naming the setting, its value, and what is allowed.
        """
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ConfigError(f"steps is {self.steps!r}; allowed is a whole number, 0 or more.")
        for name in ("step_size", "longest_step", "farthest"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise ConfigError(f"{name} is {value!r}; allowed is above 0.")


def _meta_lr(rates: MetaLearningRates | Mapping[str, float]) -> MetaLearningRates:
    if isinstance(rates, MetaLearningRates):
        return rates
    names = [rate.name for rate in fields(MetaLearningRates)]
    if not isinstance(rates, Mapping) or set(rates) != set(names):
        raise ConfigError(f"meta_lr is {rates}; it needs a rate of at least 0 for each of {', '.join(names)}.")
    return MetaLearningRates(**rates)
