"""Estimators of the hypergradient, d L_V / d (beta, eta): how a client's recipe should change.

All share one small interface, `HypergradientEstimator`; `ESTIMATORS` has them by name.
"""

from fedl2p.core.hypergradients.base import Hypergradient, HypergradientEstimator
from fedl2p.core.hypergradients.fomaml import FOMAML
from fedl2p.core.hypergradients.ift import IFT
from fedl2p.core.hypergradients.unrolled import Unrolled

ESTIMATORS: dict[str, type[HypergradientEstimator]] = {"ift": IFT, "fomaml": FOMAML, "unrolled": Unrolled}

__all__ = ["ESTIMATORS", "FOMAML", "IFT", "Hypergradient", "HypergradientEstimator", "Unrolled"]
