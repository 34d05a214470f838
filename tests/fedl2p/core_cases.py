"""Tiny float64 problems and finite differences that the tests of the mathematical core share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.differentiation import FUNC_TRANSFORMS, Differentiation
from fedl2p.core.episode import Episode
from fedl2p.core.finetune import FineTuned, evaluation_loss, finetune, initial_running
from fedl2p.core.functional import Batch, FunctionalModel, InnerState, LossFunction
from fedl2p.core.hypergradients import Hypergradient, HypergradientEstimator
from fedl2p.core.meta_nets import Hyperparameters
from fedl2p.core.settings import BatchNormMode
from fedl2p.core.statistics import ClientStatistics, collect_statistics


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every batch norm random affine parameters and random running statistics, in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            for tensor, low, high in (
                (layer.weight, 0.5, 1.5),
                (layer.bias, -0.5, 0.5),
                (layer.running_mean, -1.0, 1.0),
                (layer.running_var, 0.3, 3.0),
            ):
                if tensor is not None:
                    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.data.copy_(low + (high - low) * drawn)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(3)
    return module


class ConvNet(nn.Module):
    """conv, BN, tanh, conv, BN, tanh, mean over space, linear: smooth, so that finite differences are exact."""

    def __init__(self, momentum: float | None = 0.1, classes: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2, momentum=momentum)
        self.conv2 = nn.Conv2d(2, 3, 2)
        self.bn2 = nn.BatchNorm2d(3, momentum=momentum)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(3, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.bn1(self.conv1(inputs)))
        hidden = torch.tanh(self.bn2(self.conv2(hidden)))
        return self.fc(self.dropout(hidden.mean((2, 3))))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Builds a module in float64 with its random weights and statistics drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomize(build().double(), seed)


def image_batches(*sizes: int, seed: int = 0, classes: int = 3, shift: float = 0.5) -> list[Batch]:
    """Random 1x4x4 images, one batch a size."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            shift + 1.3 * torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(classes, (size,), generator=generator),
        )
        for size in sizes
    ]


class Case(NamedTuple):
    """A client's problem: everything that the inner loop and the estimators read."""

    model: FunctionalModel
    statistics: ClientStatistics
    start: InnerState
    train: list[Batch]
    val: list[Batch]
    beta: Tensor
    eta: Tensor
    differentiation: Differentiation = FUNC_TRANSFORMS

    def tune(self, history: int = 0) -> FineTuned:
        return finetune(
            self.model,
            self.start,
            self.train,
            self.beta,
            self.eta,
            history=history,
            differentiation=self.differentiation,
        )

    def episode(self) -> Episode:
        """The case as an episode; without training data `ift` takes its loss on validation data."""
        running = {name: b for name, b in self.start.buffers.items() if name.rpartition(".")[2].startswith("running")}
        loss_batch = self.train[0] if self.train else self.val[0]
        return Episode(self.statistics.net_inputs(), running, self.train, self.val, loss_batch=loss_batch)

    def estimate(
        self,
        estimator: HypergradientEstimator,
        *,
        tuned: FineTuned | None = None,
        bn_mode: BatchNormMode = BatchNormMode.running,
    ) -> Hypergradient:
        """The hypergradient after fine-tuning, or at a state that is `tuned` already."""
        return estimator(
            self.model,
            self.episode(),
            tuned or self.tune(estimator.history(len(self.train))),
            Hyperparameters(self.beta, self.eta),
            bn_mode=bn_mode,
            differentiation=self.differentiation,
        )

    def val_loss(
        self, beta: Tensor, eta: Tensor, *, start: InnerState | None = None, steps: int | None = None
    ) -> Tensor:
        """The whole procedure: fine-tune (the last `steps`), then the validation loss."""
        batches = self.train if steps is None else self.train[len(self.train) - steps :]
        final = finetune(self.model, start or self.start, batches, beta, eta).final
        return evaluation_loss(self.model, final, beta, self.val)


def make_case(
    module: nn.Module,
    train: list[Batch],
    val: list[Batch],
    *,
    loss_fn: LossFunction = nn.functional.cross_entropy,
    seed: int = 0,
    rate: float = 0.3,
) -> Case:
    """A problem for a plain module, with the measured start, betas inside (0, 1) and etas of both signs and one 0."""
    model = FunctionalModel.of(convert_batchnorm(module), loss_fn)
    statistics = collect_statistics(model.module, train or val)
    parameters, buffers = model.tensors()
    start = InnerState(parameters, {**buffers, **initial_running(model, buffers, statistics)})
    generator = torch.Generator().manual_seed(seed + 100)
    beta = 0.1 + 0.8 * torch.rand(len(model.batchnorm_names), generator=generator, dtype=torch.float64)
    eta = rate * (torch.rand(len(model.parameter_names), generator=generator, dtype=torch.float64) - 0.3)
    eta[1], eta[0] = 0.0, -0.1
    return Case(model, statistics, start, train, val, beta, eta)


def conv_case(*, momentum: float | None = 0.1, steps: int = 3, seed: int = 0) -> Case:
    """A small conv-BN problem with unequal training batches and ragged validation batches."""
    sizes = [5, 4, 6, 5, 3][:steps]
    return make_case(
        seeded(lambda: ConvNet(momentum), seed),
        image_batches(*sizes, seed=seed + 1),
        image_batches(6, 3, seed=seed + 2, shift=0.9),
        seed=seed,
    )


class PictureAndAge(nn.Module):
    """Takes two tensors of other shapes by name or by position: 1x4x4 pictures and an age each."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()
        self.bn3 = nn.BatchNorm1d(2)
        self.fc = nn.Linear(2, 3)

    def forward(self, picture: Tensor, age: Tensor) -> Tensor:
        return self.net(picture) + self.fc(torch.tanh(self.bn3(torch.cat([age, age**2], 1))))


def aged(batches: list[Batch], *, by_name: bool) -> list[Batch]:
    """Batches of pictures with an age each, as a dict (not in the model's own order) or as a tuple."""
    generator = torch.Generator().manual_seed(len(batches))
    result: list[Batch] = []
    for pictures, targets in batches:
        ages = 1 + torch.randn(len(pictures), 1, generator=generator, dtype=torch.float64)
        result.append(({"age": ages, "picture": pictures} if by_name else (pictures, ages), targets))
    return result


def named_inputs_case(*, by_name: bool = True) -> Case:
    """A problem whose inputs are a dict of two tensors, or a tuple of the same two."""
    train, val = image_batches(5, 4, 6, seed=1), image_batches(6, 3, seed=2, shift=0.9)
    return make_case(seeded(PictureAndAge), aged(train, by_name=by_name), aged(val, by_name=by_name))


def central_differences(function: Callable[[Tensor], Tensor], point: Tensor, step: float = 1e-5) -> Tensor:
    """d function / d point by central finite differences, entry by entry."""
    result = torch.zeros_like(point)
    for index in range(len(point)):
        moved = torch.zeros_like(point)
        moved[index] = step
        result[index] = (function(point + moved) - function(point - moved)) / (2 * step)
    return result


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Asserts equal shapes and a maximum error of `tolerance` relative to the largest entry."""
    assert actual.shape == expected.shape
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(scale, 1e-3))


@contextmanager
def unchanged(*trees: object) -> Iterator[None]:
    """Asserts that no tensor in the given nested containers is written to inside the block."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]
    before = [leaf.detach().clone() for leaf in leaves]
    assert leaves
    yield
    for leaf, copy in zip(leaves, before, strict=True):
        assert torch.equal(leaf, copy)
