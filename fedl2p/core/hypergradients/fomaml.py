"""FOMAML+ (Appendix F of the FedL2P paper): the last inner step, its gradient held constant."""

from fedl2p.core.differentiation import FUNC_TRANSFORMS, Differentiation
from fedl2p.core.episode import Episode
from fedl2p.core.finetune import FineTuned
from fedl2p.core.functional import FunctionalModel
from fedl2p.core.hypergradients.base import (
    Hypergradient,
    HypergradientEstimator,
    dot_by_tensor,
    last_step_gradient,
    validation_gradient,
)
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import BatchNormMode


class FOMAML(HypergradientEstimator):
    """Backpropagation of the validation loss through `theta = theta_before - eta * g` with a constant g.

    So d L_V / d eta_j = -(d L_V / d theta_j) . g_j, the derivative of the last step by eta, and d L_V / d beta is the
    partial derivative at fixed parameters and running statistics.
    """

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
        if not episode.train_batches:
            return Hypergradient(validation.beta, eta * 0, validation.loss)
        step = last_step_gradient(model, episode, tuned, beta)
        return Hypergradient(validation.beta, -dot_by_tensor(validation.parameters, step), validation.loss)
