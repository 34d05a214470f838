"""Models of torchvision and timm pass the check before a run."""

from types import SimpleNamespace
from typing import cast

import pytest

from fedl2p.datamodules.base.federated import FederatedDataModule
from fedl2p.experiment.build import build_model, check_model
from fedl2p.experiment.schema import ComponentConfig, Config

AT_LARGE = {
    "torchvision.models": [
        *("resnet18", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
        *("efficientnet_v2_s", "regnet_y_400mf", "densenet121", "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1"),
        *("vgg11_bn", "convnext_tiny", "swin_t"),
    ],
    "timm.create_model": [
        *("resnet10t", "mobilenetv3_small_050", "regnety_002", "lcnet_050", "convnext_atto", "vit_tiny_patch16_224"),
    ],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, for rare operations
@pytest.mark.parametrize(("source", "name"), [(source, name) for source in AT_LARGE for name in AT_LARGE[source]])
def test_models_at_large_pass_the_check_before_a_run(source: str, name: str) -> None:
    path = source if source == "timm.create_model" else f"{source}.{name}"
    arguments = {"model_name": name} if source == "timm.create_model" else {}
    config = Config(model=ComponentConfig(path, {"num_classes": 4, **arguments}))
    size = 224 if "vit" in name else 64
    data = SimpleNamespace(input_shape=(3, size, size), num_classes=4)
    check_model(config, cast(FederatedDataModule, data), build_model(config))
