"""Computes every number of a golden file with the project's own functions, in float64.

`compute` only maps names: the network's definition is the golden file's, all arithmetic is `fedl2p`'s.
"""

import json
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.episode import make_episode
from fedl2p.core.finetune import evaluation_loss, finetune
from fedl2p.core.functional import Batch, FunctionalModel, InnerState
from fedl2p.core.hypergradients import FOMAML, IFT, HypergradientEstimator
from fedl2p.core.meta_nets import Hyperparameters, MetaNets
from fedl2p.core.settings import RunningStart
from fedl2p.core.statistics import collect_statistics

META_NAMES = {
    "bn_net.layers.0": "bn_net/model.0",
    "bn_net.layers.1": "bn_net/model.2",
    "bn_net.layers.2": "bn_net/model.4",
    "lr_net.layers.0": "lr_net/first_layer.0",
    "lr_net.layers.1": "lr_net/hl_0.0",
    "lr_net.layers.2": "lr_net/last_layer",
}


class GoldenNet(nn.Module):
    """The network of the golden files (see their README)."""

    def __init__(self, in_channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(inputs)))
        skip = torch.relu(self.bn2(self.conv2(hidden)))
        hidden = torch.relu(self.bn3(self.conv3(skip)) + skip)
        return self.fc(hidden.mean((2, 3)))


def compute(path: str | Path) -> dict[str, numpy.ndarray]:
    """Returns every `out/...` entry for the inputs in the file at `path`."""
    with numpy.load(path) as archive:
        case = {key: archive[key] for key in archive.files}
    spec = json.loads(str(case["spec"]))
    module = convert_batchnorm(_pretrained(case, spec))
    model = FunctionalModel.of(module)
    meta_nets = _meta_nets(case, module)

    first_batches = _split(case, spec["train_batches"])
    batches = [first_batches[k % len(first_batches)] for k in range(spec["inner_steps"] + 1)]
    train_batches, loss_batch = batches[:-1], batches[-1]
    val_batches = [(torch.from_numpy(case["data/val/x"]), torch.from_numpy(case["data/val/y"]))]

    statistics = collect_statistics(module, first_batches)
    multiplier = meta_nets.lr_net(statistics.layer_moments)
    beta, eta = meta_nets(*statistics.net_inputs())
    episode = make_episode(model, statistics, train_batches, val_batches, running_start=RunningStart.zero_one)
    episode = episode._replace(loss_batch=loss_batch)
    tuned = finetune(model, episode.start(InnerState(*model.tensors())), train_batches, beta, eta, history=1)

    out: dict[str, Tensor] = {
        "out/xi": statistics.bn_divergence[None],
        "out/features": statistics.layer_moments[None],
        "out/beta": beta[None],
        "out/lr_multiplier": multiplier[None],
        "out/eta": eta,
        "out/loss/val": evaluation_loss(model, tuned.final, beta, val_batches)[None],
        "out/loss/train": evaluation_loss(model, tuned.final, beta, [loss_batch])[None],
    }
    out |= {f"out/theta/{name}": p for name, p in tuned.final.parameters.items()}
    for name in model.batchnorm_names:
        for kind in ("running_mean", "running_var"):
            out[f"out/running/{name}.{kind}"] = tuned.final.buffers[f"{name}.{kind}"]
    ift = IFT(form="paper", neumann_terms=spec["neumann_terms"], neumann_lr=spec["neumann_lr"])
    estimators: dict[str, HypergradientEstimator] = {"ift": ift, "fomaml": FOMAML()}
    for label, estimator in estimators.items():
        estimate = estimator(model, episode, tuned, Hyperparameters(beta.detach(), eta.detach()))
        names, tensors = zip(*meta_nets.named_parameters(), strict=True)
        gradients = torch.autograd.grad([beta, eta], tensors, [estimate.beta, estimate.eta], retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            out[f"out/hypergrad/{label}/{_golden_name(name)}"] = gradient
    return {key: value.detach().numpy() for key, value in out.items()}


def _pretrained(case: dict[str, numpy.ndarray], spec: dict[str, int]) -> nn.Module:
    net = GoldenNet(spec["in_channels"], spec["width"], spec["num_classes"]).double()
    weights = {key.removeprefix("model/"): torch.from_numpy(v) for key, v in case.items() if key.startswith("model/")}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return net


def _meta_nets(case: dict[str, numpy.ndarray], module: nn.Module) -> MetaNets:
    meta_nets = MetaNets(module, initialization="paper", log_divergence=False).double()
    parameters = dict(meta_nets.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            key = "lr_base" if name == "base_lr" else _golden_name(name)
            parameter.copy_(torch.from_numpy(case[f"meta/{key}"]))
    return meta_nets


def _golden_name(name: str) -> str:
    if name == "base_lr":
        return "lr_base"
    layer, _, kind = name.rpartition(".")
    return f"{META_NAMES[layer]}.{kind}"


def _split(case: dict[str, numpy.ndarray], sizes: list[int]) -> list[Batch]:
    inputs = torch.from_numpy(case["data/train/x"]).split(sizes)
    targets = torch.from_numpy(case["data/train/y"]).split(sizes)
    return list(zip(inputs, targets, strict=True))
