"""Implicit differentiation with a Neumann series (Eq. 6 to 10 and Algorithm 2 of the FedL2P paper)."""

from typing import Literal

import torch
from torch import Tensor

from fedl2p.core.differentiation import FUNC_TRANSFORMS, Differentiation
from fedl2p.core.episode import Episode
from fedl2p.core.finetune import FineTuned
from fedl2p.core.functional import FunctionalModel, Tensors
from fedl2p.core.hypergradients.base import (
    Hypergradient,
    HypergradientEstimator,
    add,
    dot_by_tensor,
    last_step_gradient,
    validation_gradient,
)
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import BatchNormMode
from fedl2p.errors import ConfigError


class IFT(HypergradientEstimator):
    """The implicit function theorem at the fine-tuned parameters, the inverse Hessian as a truncated Neumann series.

    With v = d L_V / d theta, H the Hessian of the training loss L_T by theta, g the gradient of the last inner step
    (a constant) and p = sum over j <= Q of (I - psi H)^j v:

    - `form="paper"`: Algorithm 2 as the authors run it, with L_T in evaluation mode:
      beta: partial L_V - p . d2 L_T / (d theta d beta); eta_j: +(H p)_j . g_j. The sum lacks the factor psi that would
      make it an inverse of H, and the eta part has the sign opposite to the finite difference of L_V.
    - `form="corrected"`: L_T in training mode, the loss that fine-tuning lowers, and psi p in place of p:
      beta: partial L_V - psi p . d2 L_T / (d theta d beta); eta_j: -psi (H p)_j . g_j. As Q grows psi p tends to
      H^-1 v, so the beta part tends to the implicit gradient of the argmin, and the eta part to -v_j . g_j, FOMAML+'s
      (at an optimum the rate does not matter, so implicit differentiation by itself says 0).

    The graph of the gradient of L_T by (theta, beta) is kept: pulling (v, 0) back through it gives H v and the mixed
    term v . d2 L_T / (d theta d beta) at once, since second derivatives are symmetric. Both are linear, so those of p,
    a sum of such v, are sums too, and no product is taken twice.
    """

    def __init__(
        self, *, form: Literal["paper", "corrected"] = "corrected", neumann_terms: int = 3, neumann_lr: float = 0.1
    ) -> None:
        """Sets the estimator up.

        Args:
            form: see above.
            neumann_terms: Q, the number of terms beyond the first, at least 0.
            neumann_lr: psi, positive; the series converges where psi times the largest eigenvalue of H is below 2.

        Raises:
            ConfigError: a value outside those.
        """
        if form not in ("paper", "corrected"):
            raise ConfigError(f"The form of ift is '{form}'; allowed are 'paper' and 'corrected'.")
        if neumann_terms < 0 or neumann_lr <= 0:
            raise ConfigError(
                f"neumann_terms is {neumann_terms} and neumann_lr {neumann_lr}; allowed are at least 0 and above 0."
            )
        self.form = form
        self.neumann_terms = neumann_terms
        self.neumann_lr = neumann_lr

    def history(self, num_steps: int) -> int:
        """One state, the one before the last step; see `HypergradientEstimator`."""
        return min(1, num_steps)

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
        """The estimate; see `HypergradientEstimator`."""
        beta, eta = hyperparameters
        validation = validation_gradient(model, episode, tuned.final, beta, bn_mode)
        batch = episode.loss_batch
        if not batch:
            return Hypergradient(validation.beta, torch.zeros_like(eta), validation.loss)
        state, batch, beta = differentiation.prepare((tuned.final, batch, beta))

        def objective(parameters: Tensors, beta: Tensor) -> tuple[Tensor, Tensors]:
            return model.loss(parameters, state.buffers, beta, batch, training=self.form == "corrected")[0], {}

        _, pull_back = differentiation.grad_and_vjp(objective, state.parameters, beta)
        v = validation.parameters
        hessian_p, mixed = pull_back((v, {}))
        hessian_v = hessian_p
        for _ in range(self.neumann_terms):
            v = add(v, hessian_v, -self.neumann_lr)
            hessian_v, mixed_v = pull_back((v, {}))
            hessian_p, mixed = add(hessian_p, hessian_v), mixed + mixed_v
        scale = 1.0 if self.form == "paper" else self.neumann_lr
        sign = 1.0 if self.form == "paper" else -1.0
        d_eta = torch.zeros_like(eta)
        if episode.train_batches:
            d_eta = sign * scale * dot_by_tensor(hessian_p, last_step_gradient(model, episode, tuned, beta))
        return Hypergradient(validation.beta - scale * mixed, d_eta, validation.loss)
