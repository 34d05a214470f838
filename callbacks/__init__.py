"""What looks on while a run goes: Lightning callbacks for a client, round callbacks for the federation.

The classes are imported when they are first asked for, so `import callbacks` costs nothing and needs neither
Lightning nor Weights & Biases.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedl2p.callbacks.hyperparameters import HyperparameterLogger
    from fedl2p.callbacks.metrics_file import MetricsFile
    from fedl2p.callbacks.progress import RoundProgress
    from fedl2p.callbacks.wandb_rounds import WandbRounds, start_wandb

__all__ = ["HyperparameterLogger", "MetricsFile", "RoundProgress", "WandbRounds", "start_wandb"]

_MODULES = {
    "HyperparameterLogger": "hyperparameters",
    "MetricsFile": "metrics_file",
    "RoundProgress": "progress",
    "WandbRounds": "wandb_rounds",
    "start_wandb": "wandb_rounds",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


if __name__ == "callbacks":  # in a clone, by the folder's own name
    from fedl2p._aliases import make_alias

    make_alias(__name__, "fedl2p.callbacks")
