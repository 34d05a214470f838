"""What is measured: a client of the paper's CIFAR-10, and federations of the demo's small network."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.differentiation import Autograd
from fedl2p.core.functional import Batch, FunctionalModel, InnerState
from fedl2p.core.hypergradients import HypergradientEstimator
from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.settings import LearnerSettings
from fedl2p.core.statistics import collect_statistics
from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.models import ResNet18, SmallConvNet

RATE, BETA = 0.01, 0.5


class Client:
    """ResNet-18 at 32x32 with 40 training images, in batches of 32 and 8, and 10 validation images.

    Attributes:
        plain: theta_g, with ordinary batch norms.
        model: the same, converted, as a function.
        differentiation: how derivatives are taken, as `Learner.fit_to` chooses for networks of this size.
        statistics: of the training images.
        state: where fine-tuning starts.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.plain: nn.Module = ResNet18(variant="cifar", num_classes=10)
        self.train: list[Batch] = [_images(32), _images(8)]
        self.val = _images(10)
        converted = convert_batchnorm(self.plain).requires_grad_(False)
        self.model = FunctionalModel.of(converted.to(memory_format=torch.channels_last))  # type: ignore[call-overload]  # stubs lack it
        self.differentiation = Autograd(fused_batchnorm=True)
        self.statistics = collect_statistics(converted, self.train)
        self.state = InnerState(*self.model.tensors())
        self.beta = torch.full((len(self.model.batchnorm_names),), BETA)
        self.eta = torch.full((len(self.model.parameter_names),), RATE)

    def copy(self) -> nn.Module:
        """A copy of theta_g of one's own."""
        return copy.deepcopy(self.plain)


def _images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 32, 32), torch.randint(10, (count,))


class Small(FederatedDataModule):
    """Clients of the demo's size: 16 training, 8 validation and 8 test images of 8x8; all in one array."""

    num_classes = 10

    def __init__(self, clients: int) -> None:
        super().__init__(batch_size=16)
        self.count = clients

    def build_clients(self) -> Iterable[ClientData]:
        """All of the seen pool."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.rand(64, 1, 8, 8, generator=generator)
        labels = torch.randint(10, (64,), generator=generator)
        train, val, test = (TensorDataset(inputs[s], labels[s]) for s in (slice(16), slice(16, 24), slice(24, 32)))
        for number in range(self.count):
            yield ClientData(name=f"c{number}", pool="seen", train=train, val=val, test=test)


def small_runtime(
    clients: int, *, estimator: HypergradientEstimator | None = None, **options: Any
) -> tuple[Small, ClientRuntime]:
    """A federation of the demo's network and settings."""
    torch.manual_seed(0)
    data = Small(clients)
    data.setup()
    model = convert_batchnorm(SmallConvNet(widths=[8, 16, 32], momentum=0.5))
    settings = LearnerSettings.of(meta_iterations=1, finetune_epochs=5, evaluation_statistics="batch")
    nets = MetaNets(model, base_lr=0.1)
    return data, ClientRuntime(data, model, nets, estimator=estimator, settings=settings, **options)
