"""How the rounds go: each default and each bound stands here once."""

import math
from dataclasses import dataclass
from typing import Literal

from fedl2p.errors import ConfigError
from fedl2p.federation.aggregation import AGGREGATIONS

DECAYS = ("none", "cosine")


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """How the rounds go.

    Attributes:
        rounds: T, the number of the last round; 0 only measures the initial lambda.
        patience: stop after so many rounds without a better lambda; at least 1.
        client_fraction: r, the share of the participants in a round, above 0 and at most 1.
        validation_fraction: the share of the participants in the fixed validation cohort, likewise.
        min_reply_fraction: of the clients that are asked, the share that must give a usable answer, likewise.
        meta_lr_decay: `cosine` lowers the meta learning rates to 0 over the rounds; `none` keeps them (the paper).
        aggregation: how the clients' lambdas become one, see `combine`; `mean` is Algorithm 1's. With the others, the
            validation losses are combined by a trimmed mean without weights.
        max_update_norm: how far a client can move lambda in a round, as a Euclidean norm; longer updates are shortened.
            `auto` follows the updates of the round, see `clip_updates`; None is no limit.
        max_client_weight: the largest share of a round that one client can weigh, above 0 and at most 1.
        max_loss_ratio: a round after which the median client's validation loss is more than so many times the best
            loss is rolled back to the lambda of that one, at least 1; None never rolls back.
        seed: of the run.

    Raises:
        ConfigError: a value outside those.
    """

    rounds: int = 100
    patience: int = 100
    client_fraction: float = 0.1
    validation_fraction: float = 1.0
    min_reply_fraction: float = 0.5
    meta_lr_decay: str = "none"
    aggregation: str = "mean"
    max_update_norm: float | Literal["auto"] | None = "auto"
    max_client_weight: float = 0.75
    max_loss_ratio: float | None = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        for key in ("client_fraction", "validation_fraction", "min_reply_fraction", "max_client_weight"):
            value = getattr(self, key)
            if not 0 < value <= 1:
                raise ConfigError(f"federation.{key} is {value}; allowed is above 0 and at most 1.")
        for key, words in (("meta_lr_decay", DECAYS), ("aggregation", AGGREGATIONS)):
            value = getattr(self, key)
            if value not in words:
                allowed = ", ".join(repr(word) for word in words[:-1])
                raise ConfigError(f"federation.{key} is '{value}'; allowed are {allowed} and {words[-1]!r}.")
        norm = self.max_update_norm
        if norm not in ("auto", None) and not 0 < float(norm) < math.inf:
            raise ConfigError(f"federation.max_update_norm is {norm}; allowed is above 0, 'auto' or null.")
        if self.max_loss_ratio is not None and not 1 <= self.max_loss_ratio < math.inf:
            raise ConfigError(f"federation.max_loss_ratio is {self.max_loss_ratio}; allowed is 1 or more, or null.")
        if self.rounds < 0:
            raise ConfigError(f"federation.rounds is {self.rounds}; allowed is at least 0.")
        if self.patience < 1:
            raise ConfigError(f"federation.patience is {self.patience}; allowed is at least 1.")
