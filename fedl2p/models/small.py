"""The small network of the demo."""

from collections.abc import Sequence

from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """Convolutions of 3x3 with batch norm and ReLU, global average pooling, and a linear head.

    The first convolution keeps the resolution and each further one halves it.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 32),
        momentum: float = 0.1,
    ) -> None:
        """Builds the network.

        Args:
            in_channels: channels of the images.
            num_classes: outputs.
            widths: channels of each convolution.
            momentum: of the running statistics of the batch norms.
        """
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for index, width in enumerate(widths):
            stride = 1 if index == 0 else 2
            layers.append(nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(width, momentum=momentum))
            layers.append(nn.ReLU())
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        return self.head(self.pool(self.features(inputs)).flatten(1))
