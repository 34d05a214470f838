"""The reference: one client in the order of operations of the authors' public code, written plainly.

Mixed batch norm as a chain of elementwise operations; tensors in the contiguous format; client statistics in two
passes over the data, one for the batch norms and one for the layers' inputs; a clone of the model a meta iteration; SGD
a tensor at a time; the hypergradient by double backward on the graph of the training loss.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]


class PlainMixedBatchNorm(nn.Module):
    """Eq. 2, step by step; running statistics start at 0 and 1 and move by 0.1."""

    def __init__(self, source: nn.BatchNorm2d, beta: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps
        assert source.running_mean is not None and source.running_var is not None
        self.register_buffer("pretrained_mean", source.running_mean.clone())
        self.register_buffer("pretrained_var", source.running_var.clone())
        self.register_buffer("running_mean", torch.zeros_like(source.running_mean))
        self.register_buffer("running_var", torch.ones_like(source.running_var))
        self.beta = beta

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalizes (N, J, H, W)."""
        if self.training:
            mean = inputs.mean((0, 2, 3))
            var = inputs.var((0, 2, 3), unbiased=False)
            count = inputs.numel() / inputs.shape[1]
            with torch.no_grad():
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean
                self.running_var = 0.9 * self.running_var + 0.1 * var * count / (count - 1)
        else:
            mean, var = self.running_mean, self.running_var
        mean = (1 - self.beta) * self.pretrained_mean + self.beta * mean
        var = (1 - self.beta) * self.pretrained_var + self.beta * var
        normalized = (inputs - mean[None, :, None, None]) / torch.sqrt(var[None, :, None, None] + self.eps)
        return normalized * self.weight[None, :, None, None] + self.bias[None, :, None, None]


def with_mixed_batch_norms(model: nn.Module, beta: Tensor) -> nn.Module:
    """The model with its `BatchNorm2d`s replaced, in place; `beta` has one entry for each."""
    positions = iter(beta.unbind())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, PlainMixedBatchNorm(child, next(positions)))
    return model


def statistics(model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Mean and variance of what enters each batch norm, then of what enters each layer: two passes."""
    model.eval()
    kinds = ((nn.BatchNorm2d,), (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    return tuple(_pass(model, batches, kind) for kind in kinds)  # type: ignore[return-value]  # of two kinds


def _pass(model: nn.Module, batches: Sequence[Batch], kinds: tuple[type[nn.Module], ...]) -> Tensor:
    kept: dict[nn.Module, list[Tensor]] = {module: [] for module in model.modules() if isinstance(module, kinds)}
    hooks = [m.register_forward_pre_hook(lambda m, args: kept[m].append(args[0].detach())) for m in kept]
    with torch.no_grad():
        for inputs, _ in batches:
            model(inputs)
    for hook in hooks:
        hook.remove()
    every = [torch.cat(values) for values in kept.values()]
    return torch.stack([torch.stack([values.mean(), values.std()]) for values in every])


def inner_step(model: nn.Module, batch: Batch, eta: Tensor) -> None:
    """One step of SGD with a rate for each tensor, in place."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), parameters)
    with torch.no_grad():
        for parameter, gradient, rate in zip(parameters, gradients, eta, strict=True):
            parameter -= rate * gradient


def ift(
    model: nn.Module, beta: Tensor, train: Batch, val: Batch, last_gradient: Sequence[Tensor], *, terms: int, psi: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 by double backward: d L_V / d (beta, eta)."""
    model.eval()
    parameters = list(model.parameters())
    *v, direct = torch.autograd.grad(cross_entropy(model(val[0]), val[1]), [*parameters, beta])
    gradients = torch.autograd.grad(cross_entropy(model(train[0]), train[1]), parameters, create_graph=True)
    p = list(v)
    for _ in range(terms):
        products = torch.autograd.grad(gradients, parameters, v, retain_graph=True)
        v = [a - psi * b for a, b in zip(v, products, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    *hessian_p, mixed = torch.autograd.grad(gradients, [*parameters, beta], p)
    eta = torch.stack([(a * b).sum() for a, b in zip(hessian_p, last_gradient, strict=True)])
    return direct - mixed, eta


def fomaml(model: nn.Module, beta: Tensor, val: Batch, last_gradient: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """First-order MAML: the gradient of the validation loss, through the last step alone."""
    model.eval()
    *v, direct = torch.autograd.grad(cross_entropy(model(val[0]), val[1]), [*model.parameters(), beta])
    return direct, -torch.stack([(a * b).sum() for a, b in zip(v, last_gradient, strict=True)])


def hessian_free(
    model: nn.Module, beta: Tensor, train: Batch, val: Batch, last_gradient: Sequence[Tensor], *, step: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """Hessian-free MAML (Fallah et al. 2020): H v by the difference of two gradients."""
    model.eval()
    parameters = list(model.parameters())
    *v, direct = torch.autograd.grad(cross_entropy(model(val[0]), val[1]), [*parameters, beta])
    sides = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, v, strict=True):
                parameter += sign * step * direction
        sides.append(torch.autograd.grad(cross_entropy(model(train[0]), train[1]), [*parameters, beta]))
    with torch.no_grad():
        for parameter, direction in zip(parameters, v, strict=True):
            parameter += step * direction
    *products, mixed = [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]
    eta = torch.stack([(a * b).sum() for a, b in zip(products, last_gradient, strict=True)])
    return direct - mixed, -eta


def meta_update(
    model: nn.Module,
    beta: Tensor,
    eta: Tensor,
    batches: Sequence[Batch],
    val: Batch,
    *,
    epochs: int,
    iterations: int,
    terms: int = 3,
    psi: float = 0.1,
) -> list[tuple[Tensor, Tensor]]:
    """A client's K meta iterations by `ift`, without the nets' own work, which is the same everywhere."""
    results = []
    for _ in range(iterations):
        statistics(model, batches)
        leaf = beta.clone().requires_grad_()
        own = with_mixed_batch_norms(copy.deepcopy(model), leaf).train()
        parameters = list(own.parameters())
        for batch in [batch for _ in range(epochs) for batch in batches]:
            before = [p.detach().clone() for p in parameters] if batch is batches[-1] else None
            inner_step(own, batch, eta)
        assert before is not None
        gradient = [(a - b) / rate for a, b, rate in zip(before, parameters, eta, strict=True)]
        results.append(ift(own, leaf, batches[0], val, gradient, terms=terms, psi=psi))
    return results
