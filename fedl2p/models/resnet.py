"""ResNet-18 (He et al. 2016) as the FedL2P paper adapts it (Appendix D)."""

import os
from typing import Literal
from urllib.error import URLError

import torchvision
from torch import Tensor, nn

from fedl2p.errors import ConfigError, ModelError
from fedl2p.models.weights import load_weights

Variant = Literal["cifar", "imagenet", "speech"]

PRETRAINED = "IMAGENET1K_V1"
_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


class ResNet18(nn.Module):
    """torchvision's ResNet-18, with another stem for small inputs: 20 batch norms, 41 layers, 62 parameter tensors.

    - `cifar`: a first convolution of 3x3 with stride 1, and no max-pooling; for 32x32 images.
    - `imagenet`: as published; for images of about 224x224.
    - `speech`: as published, for one channel and without max-pooling; for MFCCs.

    Names of layers are torchvision's, so its weight files fit.
    """

    def __init__(
        self,
        *,
        variant: Variant = "cifar",
        num_classes: int = 10,
        in_channels: int | None = None,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        """Builds the network.

        Args:
            variant: see above.
            num_classes: outputs.
            in_channels: channels of the inputs; None is 1 for `speech` and 3 otherwise.
            weights: a weight file (a head for another number of classes is left out), or "IMAGENET1K_V1", which
                torchvision downloads (45 MB) for the variant `imagenet`.

        Raises:
            ConfigError: an unknown variant, or numbers below 1.
            ModelError: the weights cannot be had, or do not fit.
        """
        super().__init__()
        if variant not in ("cifar", "imagenet", "speech"):
            raise ConfigError(f"variant is '{variant}'; allowed are 'cifar', 'imagenet' and 'speech'.")
        channels = in_channels if in_channels is not None else 1 if variant == "speech" else 3
        if num_classes < 1 or channels < 1:
            raise ConfigError(f"num_classes is {num_classes} and in_channels {channels}; both must be at least 1.")
        net = torchvision.models.resnet18(num_classes=num_classes)
        if variant == "cifar":
            net.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        elif channels != 3:
            net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        # The children themselves, so that names are torchvision's.
        for name, child in net.named_children():
            self.add_module(name, nn.Identity() if name == "maxpool" and variant != "imagenet" else child)
        if weights == PRETRAINED:
            self._download(variant)
        elif weights is not None:
            load_weights(self, weights, head="fc")

    def _download(self, variant: str) -> None:
        if variant != "imagenet":
            raise ModelError(f"The weights {PRETRAINED} fit the variant 'imagenet', not '{variant}'.")
        try:
            found = torchvision.models.ResNet18_Weights[PRETRAINED].get_state_dict(check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise ModelError(
                f"The weights {PRETRAINED} cannot be downloaded ({error}); fetch {_URL} elsewhere, and set "
                "model.init_args.weights to the file."
            ) from error
        head = self.state_dict()
        if found["fc.weight"].shape != head["fc.weight"].shape:
            found |= {name: head[name] for name in ("fc.weight", "fc.bias")}
        self.load_state_dict(found)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        for name, child in self.named_children():
            inputs = child(inputs.flatten(1) if name == "fc" else inputs)
        return inputs
