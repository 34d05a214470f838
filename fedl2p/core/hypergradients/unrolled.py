"""Exact reverse mode through the inner loop, as an adjoint recursion over stored states."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.utils import _pytree as pytree

from fedl2p.core.finetune import InnerState
from fedl2p.core.functional import Batch, FunctionalModel, Tensors
from fedl2p.core.hypergradients.base import (
    Hypergradient,
    HypergradientEstimator,
    MetaProblem,
    add,
    dot_by_tensor,
    gradient_with_pull_back,
    split_running,
    validation_gradient,
)
from fedl2p.errors import ConfigError


class Unrolled(HypergradientEstimator):
    """What finite differences of the whole procedure give: fine-tune, then take the validation loss.

    The inner step is theta' = theta - eta * g(theta, beta), r' = R(theta, beta, r), with r the running statistics and g
    the gradient of the training loss L. With adjoints a of theta' and c of r', and q = eta * a, one step back is

        d eta_j -= a_j . g_j
        a      <- a - H q + d (c . R) / d theta
        d beta += -d (q . g) / d beta + d (c . R) / d beta
        c      <- d (c . R) / d r

    With G(theta, r, beta, s) the gradient of L + s (c . R) by its first three arguments, the derivative of G at s = 0
    in the direction (-q, 0, 0, 1) is all three right-hand sides at once, and its value holds g: one `jvp` of `grad` a
    step over the stored states, and no graph of activations. Second derivatives are symmetric, so pulling (-q, c) back
    through (g, R) gives the same three; that is faster for one client alone, whose graph lives as long as the step.

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

    def __call__(self, model: FunctionalModel, problem: MetaProblem) -> Hypergradient:
        """The exact derivative; see `HypergradientEstimator`."""
        validation = validation_gradient(model, problem)
        adjoint, running_adjoint, d_beta = validation.parameters, validation.running, validation.beta
        d_eta = torch.zeros_like(problem.eta)
        history = problem.tuned.history
        batches = problem.train_batches[len(problem.train_batches) - len(history) :]
        for state, batch in zip(reversed(history), reversed(batches), strict=True):
            back = _step_back(model, state, batch, problem, adjoint, running_adjoint)
            d_eta = d_eta - dot_by_tensor(adjoint, back.gradient)
            d_beta = d_beta + back.beta
            adjoint, running_adjoint = back.parameters, back.running
        return Hypergradient(d_beta, d_eta, validation.loss)


class _StepBack(NamedTuple):
    gradient: Tensors  # g of the step
    parameters: Tensors  # the new a
    running: Tensors  # the new c
    beta: Tensor  # what the step adds to d_beta


def _step_back(
    model: FunctionalModel,
    state: InnerState,
    batch: Batch,
    problem: MetaProblem,
    adjoint: Tensors,
    running_adjoint: Tensors,
) -> _StepBack:
    running, fixed = split_running(state.buffers)
    rates = dict(zip(model.parameter_names, problem.eta.unbind(-1), strict=True))
    direction = {name: -rates[name] * a for name, a in adjoint.items()}
    if model.takes_autograd(state, batch, problem.beta, problem.eta):

        def step(parameters: Tensors, running: Tensors, beta: Tensor) -> tuple[Tensor, Tensors]:
            loss, after = model.loss(parameters, {**fixed, **running}, beta, batch, training=True)
            return loss, {name: after[name] for name in running_adjoint}

        primals = state.parameters, running, problem.beta
        (gradient, _), pull_back = gradient_with_pull_back(step, *primals, by_autograd=True)
        dp, dr, db = pull_back((direction, running_adjoint))
        return _StepBack(gradient, add(adjoint, dp), dr, db)
    floating = {name: b for name, b in fixed.items() if b.is_floating_point()}

    def gradients(
        parameters: Tensors, running: Tensors, beta: Tensor, share: Tensor, weights: Tensors, floating: Tensors
    ) -> tuple[Tensors, Tensors, Tensor]:
        def objective(parameters: Tensors, running: Tensors, beta: Tensor) -> Tensor:
            buffers = {**fixed, **floating, **running}
            loss, after = model.loss(parameters, buffers, beta, batch, training=True)
            if weights:
                loss = loss + share * torch.cat([weight * after[name] for name, weight in weights.items()]).sum()
            return loss

        return grad(objective, argnums=(0, 1, 2))(parameters, running, beta)

    share = torch.zeros_like(problem.beta.sum())
    point = (state.parameters, running, problem.beta, share, running_adjoint, floating)
    # A zero tangent is cheaper than none: forward mode treats mixed operands slowly.
    still = pytree.tree_map(torch.zeros_like, point)
    tangents = (direction, *still[1:3], torch.ones_like(share), *still[4:])
    (gradient, _, _), (dp, dr, db) = jvp(gradients, point, tangents)[:2]
    return _StepBack(gradient, add(adjoint, dp), dr, db)
