"""The networks of the papers, and the small one of the demo; each is a class that a configuration can name."""

from fedl2p.models.cifar_resnet import CifarResNet
from fedl2p.models.mobilenet import MobileNetV1
from fedl2p.models.resnet import ResNet18
from fedl2p.models.small import SmallConvNet
from fedl2p.models.weights import load_weights, read_weights

__all__ = ["CifarResNet", "MobileNetV1", "ResNet18", "SmallConvNet", "load_weights", "read_weights"]
