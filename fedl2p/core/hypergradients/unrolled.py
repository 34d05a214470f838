"""Exact reverse mode through the inner loop, as an adjoint recursion over stored states."""

import torch

from fedl2p.core.differentiation import FUNC_TRANSFORMS, Differentiation
from fedl2p.core.episode import Episode
from fedl2p.core.finetune import FineTuned
from fedl2p.core.functional import FunctionalModel
from fedl2p.core.hypergradients.base import (
    Hypergradient,
    HypergradientEstimator,
    add,
    dot_by_tensor,
    validation_gradient,
)
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import BatchNormMode
from fedl2p.errors import ConfigError


class Unrolled(HypergradientEstimator):
    """What finite differences of the whole procedure give: fine-tune, then take the validation loss.

    The inner step is theta' = theta - eta * g(theta, beta), r' = R(theta, beta, r), with r the running statistics and g
    the gradient of the training loss L. With adjoints a of theta' and c of r', and q = eta * a, one step back is

        d eta_j -= a_j . g_j
        a      <- a - H q + d (c . R) / d theta
        d beta += -d (q . g) / d beta + d (c . R) / d beta
        c      <- d (c . R) / d r

    so a step back over the stored states pulls (-q, c) through (g, R): `Differentiation.step_back`.

    With dropout the recursion draws masks of its own, so it is then not exact for the steps that were taken.

    With `steps` the recursion stops after that many steps, as if beta and eta had not been in use before them.
    """

    def __init__(self, *, steps: int | None = None) -> None:
        """Sets the estimator up.

        Args:
            steps: how many of the last inner steps to go back, at least 1; None goes back to the start.

        Raises:
            ConfigError: fewer than one step.
        """
        if steps is not None and steps < 1:
            raise ConfigError(f"The steps of unrolled are {steps}; allowed are 1 or more, or none for all.")
        self.steps = steps

    def history(self, num_steps: int) -> int:
        """As many states as steps to go back; see `HypergradientEstimator`."""
        return num_steps if self.steps is None else min(self.steps, num_steps)

    def __call__(
        self,
        model: FunctionalModel,
        episode: Episode,
        tuned: FineTuned,
        hyperparameters: Hyperparameters,
        *,
        bn_mode: BatchNormMode = BatchNormMode.running,
        differentiation: Differentiation = FUNC_TRANSFORMS,
    ) -> Hypergradient:
        """The exact derivative; see `HypergradientEstimator`."""
        beta, eta = hyperparameters
        validation = validation_gradient(model, episode, tuned.final, beta, bn_mode)
        adjoint, running_adjoint, d_beta = validation.parameters, validation.running, validation.beta
        d_eta, rates = torch.zeros_like(eta), dict(zip(model.parameter_names, eta.unbind(-1), strict=True))
        batches = episode.train_batches[len(episode.train_batches) - len(tuned.history) :]
        for state, batch in zip(reversed(tuned.history), reversed(batches), strict=True):
            direction = {name: -rates[name] * a for name, a in adjoint.items()}
            back = differentiation.step_back(model, state, batch, beta, direction, running_adjoint)
            d_eta = d_eta - dot_by_tensor(adjoint, back.gradient)
            d_beta = d_beta + back.beta
            adjoint, running_adjoint = add(adjoint, back.parameters), back.running
        return Hypergradient(d_beta, d_eta, validation.loss)
