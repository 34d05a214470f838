"""MobileNetV1 (Howard et al. 2017) with a width multiplier."""

import os
from collections.abc import Sequence

from torch import Tensor, nn

from fedl2p.errors import ConfigError
from fedl2p.models.weights import load_weights

# Channels at width 1 and stride of each separable block, in the three stages that the weight file names.
_STAGES = (
    ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)
_SLOPE = 0.1  # of the leaky ReLU


def _full(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.LeakyReLU(_SLOPE))


def _separable(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Each channel by itself, then all pixels by themselves."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.LeakyReLU(_SLOPE),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(_SLOPE),
    )


def _blocks(stage: Sequence[tuple[int, int]], channels: int, width: float) -> list[nn.Sequential]:
    blocks = []
    for following, stride in stage:
        blocks.append(_separable(int(channels * width), int(following * width), stride))
        channels = following
    return blocks


class MobileNetV1(nn.Module):
    """MobileNetV1: 27 batch norms; 470,072 parameters at width 0.25 with 1,000 classes.

    Names of layers are those of the weight file `mobilenetV1X0.25_pretrain.tar` (ImageNet, top-1 46.6 %, MIT licence),
    which has leaky ReLUs.
    """

    def __init__(
        self,
        *,
        width: float = 0.25,
        num_classes: int = 1000,
        in_channels: int = 3,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        """Builds the network.

        Args:
            width: multiplies all channels; such that none is below 1.
            num_classes: outputs.
            in_channels: channels of the images.
            weights: a weight file; a head for another number of classes is left out.

        Raises:
            ConfigError: a width or number that is too small.
            ModelError: the weights do not fit.
        """
        super().__init__()
        if 32 * width < 1 or num_classes < 1 or in_channels < 1:
            raise ConfigError(
                f"width is {width}, num_classes {num_classes} and in_channels {in_channels}; allowed are at least "
                "1/32, 1 and 1."
            )
        first = _full(in_channels, int(32 * width), 2)
        self.stage1 = nn.Sequential(first, *_blocks(_STAGES[0], 32, width))
        self.stage2 = nn.Sequential(*_blocks(_STAGES[1], _STAGES[0][-1][0], width))
        self.stage3 = nn.Sequential(*_blocks(_STAGES[2], _STAGES[1][-1][0], width))
        self.fc = nn.Linear(int(_STAGES[2][-1][0] * width), num_classes)
        if weights is not None:
            load_weights(self, weights, head="fc")

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        hidden = self.stage3(self.stage2(self.stage1(inputs)))
        return self.fc(hidden.mean((2, 3)))
