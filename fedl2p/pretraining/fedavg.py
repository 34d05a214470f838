"""FedAvg (McMahan et al. 2017), the client's part: a global model is trained for a while on the client's own data."""

import copy
from typing import TYPE_CHECKING

import torch
from lightning.fabric import Fabric
from torch import nn

from fedl2p.core.differentiation import gradient_scale
from fedl2p.core.finetune import to_model
from fedl2p.core.functional import LossFunction, Tensors
from fedl2p.errors import ConfigError
from fedl2p.seeding import derive_seed

if TYPE_CHECKING:
    from fedl2p.datamodules.base.federated import FederatedDataModule


class LocalTraining:
    """A client's part of FedAvg: SGD with momentum over its training data."""

    def __init__(
        self,
        data: "FederatedDataModule",
        model: nn.Module,
        *,
        epochs: int = 1,
        lr: float = 0.1,
        momentum: float = 0.9,
        loss_fn: LossFunction = nn.functional.cross_entropy,
        fabric: Fabric | None = None,
        seed: int = 0,
    ) -> None:
        """Sets the training up.

        Args:
            data: the clients' data.
            model: the structure; its tensors are not changed.
            epochs: passes over the client's data in a round, at least 1.
            lr: positive.
            momentum: in [0, 1), starting anew each round.
            loss_fn: (outputs, targets) -> mean loss.
            fabric: the device and the precision; None is the CPU in float32.
            seed: of the run.

        Raises:
            ConfigError: a value outside those.
        """
        if epochs < 1 or lr <= 0 or not 0 <= momentum < 1:
            raise ConfigError(
                f"pretraining.epochs is {epochs}, lr {lr} and momentum {momentum}; allowed are at least 1, above 0, "
                "and from 0 to below 1."
            )
        self.data = data
        self.fabric = fabric if fabric is not None else Fabric(accelerator="cpu", devices=1)
        self.model = copy.deepcopy(model).to(self.fabric.device)
        self.epochs = epochs
        self.lr = lr
        self.momentum = momentum
        self.loss_fn = loss_fn
        self.seed = seed

    def train(
        self, tensors: Tensors, client_id: int, round_number: int, *, lr_scale: float = 1.0
    ) -> tuple[Tensors, int]:
        """Trains from `tensors` (a state dict) on a client's data; returns the new ones and the number of samples."""
        seed = derive_seed(self.seed, "pretrain", round_number, client_id)
        torch.manual_seed(seed)
        self.model.load_state_dict(tensors)
        self.model.train()
        with self.fabric.autocast():
            scale = gradient_scale(self.fabric.device.type)
        # SGD with momentum is linear in the gradients, so a scaled loss is undone by the rate.
        rate = self.lr * lr_scale / scale
        optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=self.momentum)
        loader = self.data.client(client_id, seed=seed).train_dataloader()
        samples = 0
        for _ in range(self.epochs):
            samples = 0
            for batch in loader:
                ((inputs, targets),) = to_model([batch], self.model)
                optimizer.zero_grad()
                with self.fabric.autocast():
                    loss = self.loss_fn(self.model(inputs), targets)
                (loss if scale == 1.0 else loss * scale).backward()
                optimizer.step()
                samples += len(targets)
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}, samples
