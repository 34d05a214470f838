"""The residual networks for CIFAR of He et al. (2016), section 4.2, with shortcuts that have no parameters."""

import os

from torch import Tensor, nn

from fedl2p.errors import ConfigError
from fedl2p.models.weights import load_weights


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut of option A: every second pixel, zeros for new channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(inputs)).relu()))
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return (hidden + shortcut).relu()


class CifarResNet(nn.Module):
    """ResNet-20, -32, -44, ...: three stages of 16, 32 and 64 channels.

    Names of layers are those of the weight files `resnet20-12fca82f.th` and `resnet32-d509ac18.th` of the repository
    akamaster/pytorch_resnet_cifar10 (BSD-2), trained on inputs normalized by the means (0.485, 0.456, 0.406) and the
    deviations (0.229, 0.224, 0.225).
    """

    def __init__(
        self,
        *,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        """Builds the network.

        Args:
            depth: layers with weights, 6 n + 2.
            num_classes: outputs.
            in_channels: channels of the images.
            weights: a weight file; a head for another number of classes is left out.

        Raises:
            ConfigError: no such depth, or numbers below 1.
            ModelError: the weights do not fit.
        """
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigError(f"depth is {depth}; allowed are 8, 14, 20, 26, 32, ... (6 n + 2).")
        if num_classes < 1 or in_channels < 1:
            raise ConfigError(f"num_classes is {num_classes} and in_channels {in_channels}; both must be at least 1.")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        if weights is not None:
            load_weights(self, weights, head="linear")

    def _stage(self, in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
        first = _Block(in_channels, channels, stride)
        return nn.Sequential(first, *(_Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        hidden = self.bn1(self.conv1(inputs)).relu()
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.linear(hidden.mean((2, 3)))
