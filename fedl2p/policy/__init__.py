"""Trained nets for new clients: on disk, asked for a recipe, and folded into plain models."""

from fedl2p.policy.files import load_policy, write_policy
from fedl2p.policy.hyperparameters import NamedHyperparameters, UnusualClientWarning
from fedl2p.policy.policy import Personalization, Policy

__all__ = [
    "NamedHyperparameters",
    "Personalization",
    "Policy",
    "UnusualClientWarning",
    "load_policy",
    "write_policy",
]
