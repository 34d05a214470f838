"""FedL2P: federated learning to personalize, on PyTorch Lightning and Flower.

Clients learn together, without moving data, two small networks that read a client's data statistics and answer with
that client's batch-norm mixing (beta) and layer-wise learning rates (eta).

The names below are imported when they are first asked for, so `import fedl2p` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedl2p.client import FedL2PClient
    from fedl2p.core.batchnorm import MixedBatchNorm, convert_batchnorm
    from fedl2p.core.cohort import stack
    from fedl2p.core.episode import Episode, make_episode
    from fedl2p.core.functional import FunctionalModel, expected_error
    from fedl2p.core.hypergradients import FOMAML, IFT, HypergradientEstimator, Unrolled
    from fedl2p.core.learner import Learner
    from fedl2p.core.meta_nets import Hyperparameters, MetaNets
    from fedl2p.core.settings import BatchNormMode, LearnerSettings, MetaLearningRates, RunningStart
    from fedl2p.core.statistics import ClientStatistics, collect_statistics
    from fedl2p.experiment.run import run
    from fedl2p.policy import Policy

__version__ = "0.1.0"

_MODULES = {
    "FOMAML": "core.hypergradients",
    "IFT": "core.hypergradients",
    "BatchNormMode": "core.settings",
    "ClientStatistics": "core.statistics",
    "Episode": "core.episode",
    "FedL2PClient": "client",
    "FunctionalModel": "core.functional",
    "HypergradientEstimator": "core.hypergradients",
    "Hyperparameters": "core.meta_nets",
    "Learner": "core.learner",
    "LearnerSettings": "core.settings",
    "MetaLearningRates": "core.settings",
    "MetaNets": "core.meta_nets",
    "MixedBatchNorm": "core.batchnorm",
    "Policy": "policy",
    "RunningStart": "core.settings",
    "Unrolled": "core.hypergradients",
    "collect_statistics": "core.statistics",
    "convert_batchnorm": "core.batchnorm",
    "expected_error": "core.functional",
    "make_episode": "core.episode",
    "run": "experiment.run",
    "stack": "core.cohort",
}

__all__ = [
    "FOMAML",
    "IFT",
    "BatchNormMode",
    "ClientStatistics",
    "Episode",
    "FedL2PClient",
    "FunctionalModel",
    "HypergradientEstimator",
    "Hyperparameters",
    "Learner",
    "LearnerSettings",
    "MetaLearningRates",
    "MetaNets",
    "MixedBatchNorm",
    "Policy",
    "RunningStart",
    "Unrolled",
    "collect_statistics",
    "convert_batchnorm",
    "expected_error",
    "make_episode",
    "run",
    "stack",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fedl2p' has no attribute '{name}'")
    return getattr(import_module(f"fedl2p.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
