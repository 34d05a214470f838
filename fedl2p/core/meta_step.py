"""One meta iteration and one personalization, as pure functions for one client or, under `torch.vmap`, for a cohort."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vjp

from fedl2p.core.finetune import (
    EvaluationStatistics,
    FineTuned,
    InnerState,
    evaluation_batches,
    finetune,
    trained_names,
)
from fedl2p.core.functional import Batch, FunctionalModel, Tensors
from fedl2p.core.hypergradients import HypergradientEstimator, MetaProblem
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.errors import ConfigError

META_LR = {"bn_net": 1e-3, "lr_net": 1e-3, "base_lr": 1e-4}  # zeta of section 4.1


class ClientInputs(NamedTuple):
    """All tensors of one client that a meta iteration reads; stacked along a first dimension for a cohort.

    Attributes:
        net_inputs: xi (B,), the layer moments (2M,) and N_i (0-d), see `ClientStatistics.net_inputs`.
        running: the client's running statistics to start from, see `initial_running`.
        train_batches: one an inner step.
        val_batches: over which L_V is averaged.
    """

    net_inputs: tuple[Tensor, Tensor, Tensor]
    running: Tensors
    train_batches: list[Batch]
    val_batches: list[Batch]

    def start(self, origin: InnerState) -> InnerState:
        """The state that the client's fine-tuning starts from, with theta_g and all other buffers from `origin`."""
        return InnerState(origin.parameters, {**origin.buffers, **self.running})


class MetaStep(NamedTuple):
    """What a meta iteration gives.

    Attributes:
        gradients: the clipped hypergradient of lambda by name, as `MetaNets.named_parameters`; zeros if not finite.
        val_loss: L_V after fine-tuning, 0-d.
        finite: whether the loss and the hypergradient were finite, 0-d bool.
        hyperparameters: the recipe that was in use.
    """

    gradients: Tensors
    val_loss: Tensor
    finite: Tensor
    hyperparameters: Hyperparameters


def meta_step(
    model: FunctionalModel,
    meta_nets: MetaNets,
    estimator: HypergradientEstimator,
    origin: InnerState,
    lambda_: Tensors,
    client: ClientInputs,
    *,
    clip_value: float = 1.0,
    statistics: EvaluationStatistics = "running",
    trained: Sequence[str] | None = None,
) -> MetaStep:
    """Lines 9 and 10 of Algorithm 1 up to the hypergradient: recipe, fine-tuning, d L_V / d lambda.

    Args:
        model: the model.
        meta_nets: the structure of BNNet and LRNet.
        estimator: of the hypergradient by beta and eta, which the nets' own gradient carries on to lambda.
        origin: theta_g and the global model's buffers.
        lambda_: the parameters of `meta_nets`, by name.
        client: the client's tensors.
        clip_value: bound of every entry of the hypergradient (by value).
        statistics: of the evaluation in L_V, see `evaluation_loss`.
        trained: names of the tensors whose eta is not 0, see `moved_names`; None is all. Estimators take the gradients
            that they need by themselves.

    Returns:
        The hypergradient and the losses. Where something is not finite, the gradients are 0 and `finite` is False.
    """

    def recipe(lambda_: Tensors) -> Hyperparameters:
        return functional_call(meta_nets, lambda_, client.net_inputs)

    hyperparameters, pull_back = vjp(recipe, lambda_)[:2]
    beta, eta = hyperparameters
    history = estimator.history(len(client.train_batches))
    start = client.start(origin)
    tuned = finetune(model, start, client.train_batches, beta, eta, history=history, trained=trained)
    loss_batch = client.train_batches[0] if client.train_batches else None
    problem = MetaProblem(tuned, client.train_batches, loss_batch, client.val_batches, beta, eta, statistics)
    with torch.autocast(beta.device.type, enabled=False):  # products of gradients are too small for half precision
        estimate = estimator(model, problem)
        (gradients,) = pull_back(Hyperparameters(estimate.beta, estimate.eta))
    sums = torch.stack([estimate.val_loss, *(g.sum() for g in gradients.values())])
    finite = torch.isfinite(sums).all()
    gradients = {
        name: torch.where(finite, g.clamp(-clip_value, clip_value), torch.zeros_like(g))
        for name, g in gradients.items()
    }
    return MetaStep(gradients, estimate.val_loss, finite, hyperparameters)


def moved_names(
    model: FunctionalModel, meta_nets: MetaNets, lambdas: Tensors, net_inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[str, ...]:
    """Names of the tensors that a meta iteration's fine-tuning moves, for any client; called outside `torch.vmap`.

    Args:
        model: the model.
        meta_nets: the structure of BNNet and LRNet.
        lambdas: the parameters of `meta_nets`, of one client or stacked.
        net_inputs: what the nets read, of one client or stacked.
    """

    def eta(lambda_: Tensors, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional_call(meta_nets, lambda_, inputs).eta

    stacked = net_inputs[0].dim() > 1
    with torch.no_grad():
        return trained_names(model, torch.vmap(eta)(lambdas, net_inputs) if stacked else eta(lambdas, net_inputs))


def meta_optimizer(lambda_: Tensors, meta_lr: dict[str, float]) -> torch.optim.SGD:
    """SGD over lambda in three parameter groups, each with its own learning rate (zeta, section 4.1).

    SGD works entry by entry, so the lambdas of a cohort, stacked, are stepped as if each were alone.

    Args:
        lambda_: leaf tensors by the names of `MetaNets.named_parameters`.
        meta_lr: rates of `bn_net`, `lr_net` and `base_lr`.

    Raises:
        ConfigError: the rates are not for exactly those three, or not finite and at least 0.
    """
    names = ("bn_net", "lr_net", "base_lr")
    if set(meta_lr) != set(names) or not all(0 <= rate < float("inf") for rate in meta_lr.values()):
        raise ConfigError(f"meta_lr is {dict(meta_lr)}; it needs a rate of at least 0 for each of {', '.join(names)}.")
    groups: list[dict[str, Any]] = []
    for group in names:
        tensors = [tensor for name, tensor in lambda_.items() if name.partition(".")[0] == group]
        if tensors:
            groups.append({"params": tensors, "lr": meta_lr[group], "name": group})
    return torch.optim.SGD(groups)


def personalize(
    model: FunctionalModel,
    state: InnerState,
    train_batches: Sequence[Batch],
    hyperparameters: Hyperparameters,
    trained: Sequence[str] | None = None,
) -> FineTuned:
    """Fine-tunes theta_g for one client with its recipe; arguments as in `finetune`."""
    return finetune(model, state, train_batches, hyperparameters.beta, hyperparameters.eta, trained=trained)


def evaluate(
    model: FunctionalModel,
    state: InnerState,
    beta: Tensor,
    batches: Sequence[Batch],
    *,
    statistics: EvaluationStatistics = "running",
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and losses of a personalized model.

    Args:
        model: the model.
        state: the personalized state.
        beta: shape (B,).
        batches: the data, in order.
        statistics: see `evaluation_loss`.

    Returns:
        The outputs of all samples, in order, their mean loss (`loss_fn`) and validation loss (`val_loss_fn`), 0-d.
    """
    own = statistics == "batch"
    outputs = torch.cat(
        [
            model(state.parameters, state.buffers, beta, inputs, training=False, batch_statistics=own)[0]
            for inputs, _ in evaluation_batches(batches, statistics)
        ]
    )
    targets = torch.cat([y for _, y in batches])
    return outputs, model.loss_fn(outputs, targets), model.val_loss_fn(outputs, targets)
