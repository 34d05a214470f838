"""What a run costs, as in Appendix C of the FedL2P paper: memory, floating-point operations, and what travels."""

import resource
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedl2p.core.functional import Tensors
from fedl2p.core.meta_nets import MetaNets
from fedl2p.datamodules.base.federated import FederatedDataModule
from fedl2p.experiment.schema import Config
from fedl2p.federation.runtime import ClientRuntime
from fedl2p.federation.state import MetaState, RoundRecord

PASSES = 3  # forward and backward of a training step, in forward passes


def run_cost(config: Config, data: FederatedDataModule, runtime: ClientRuntime, state: MetaState) -> dict[str, Any]:
    """The key `cost` of `results.json`.

    Returns:
        `memory` (bytes), `parameters` (values in each tensor of theta_g, by name), `flops` and `bytes`, see
        `compute_cost` and `traffic`.
    """
    pretraining, seen = config.pretraining, len(data.pool("seen"))
    asked = max(1, round(pretraining.client_fraction * len(data.pool(pretraining.pool))))
    nets, module = runtime.meta_nets, runtime.model.module
    return {
        "memory": peak_memory(),
        "parameters": {name: parameter.numel() for name, parameter in module.named_parameters()},
        "flops": compute_cost(module, nets, data.input_shape, epochs=config.client.finetune_epochs),
        "bytes": traffic(
            state.history,
            lambda_=state.lambda_,
            net_inputs=dict(nets.named_buffers()),
            model=module,
            statistics=len(nets.batchnorm_names) + 2 * len(nets.layer_names),
            seen=seen,
            validation=max(1, round(config.federation.validation_fraction * seen)),
            pretraining=0 if pretraining.weights is not None else pretraining.rounds * asked,
        ),
    }


def byte_count(tensors: Iterable[Tensor]) -> int:
    """The bytes of the values of some tensors, without names or framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of one forward pass: matrix products and convolutions, a multiply-add as two."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())


def peak_memory() -> dict[str, int]:
    """The most memory so far in bytes: of the largest process of this run (`process`), and of its GPUs (`gpu`)."""
    unit = 1 if sys.platform == "darwin" else 1024
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = {"process": largest * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        found["gpu"] = max(torch.cuda.max_memory_allocated(device) for device in devices)
    return found


def compute_cost(model: nn.Module, meta_nets: MetaNets, input_shape: Sequence[int], *, epochs: int) -> dict[str, Any]:
    """Operations for one image of a client.

    Args:
        model: theta_g, from `convert_batchnorm`.
        meta_nets: fitting it.
        input_shape: of one sample.
        epochs: e, of fine-tuning.

    Returns:
        `forward` (one pass), `finetune` (e epochs, a backward pass counted as two forward ones), `statistics` (the one
        pass that gives what the nets read), `paper_statistics` (the paper's two), and `meta_nets` (once a client).
    """
    reference = next(model.parameters())
    model.eval()
    forward = forward_flops(model, reference.new_zeros((1, *input_shape)))
    xi = torch.ones(len(meta_nets.batchnorm_names), device=meta_nets.base_lr.device)
    moments = torch.ones(2 * len(meta_nets.layer_names), device=meta_nets.base_lr.device)
    nets = forward_flops(meta_nets, xi[None], moments[None], torch.ones(1, device=moments.device))
    return {
        "forward": forward,
        "finetune": PASSES * epochs * forward,
        "statistics": forward,
        "paper_statistics": 2 * forward,
        "meta_nets": nets,
    }


def traffic(
    history: Sequence[RoundRecord],
    *,
    lambda_: Tensors,
    net_inputs: Tensors,
    model: nn.Module,
    statistics: int,
    seen: int,
    validation: int,
    pretraining: int,
) -> dict[str, Any]:
    """Bytes between the server and all clients, by phase: the values of tensors, without framing.

    Args:
        history: the rounds.
        lambda_: what travels both ways in each.
        net_inputs: what goes down with it.
        model: theta_g, which each seen client gets once.
        statistics: values that a client sends once.
        seen: number of seen clients.
        validation: clients of the validation cohort.
        pretraining: how often a client took part in FedAvg.

    Returns:
        `lambda` and `global_model` (bytes of one), and by phase `down` (from the server) and `up`.
    """
    own, inputs = byte_count(lambda_.values()), byte_count(net_inputs.values())
    whole = byte_count(model.state_dict().values())
    trained = sum(len(record.clients) + _failed(record) for record in history)
    returned = sum(len(record.clients) for record in history)
    return {
        "lambda": own,
        "global_model": whole,
        "pretraining": {"down": pretraining * whole, "up": pretraining * whole},
        "once": {"down": seen * whole, "up": 4 * seen * statistics},
        "rounds": {"down": trained * (own + inputs), "up": returned * own},
        "validation": {"down": len(history) * validation * (own + inputs), "up": 8 * len(history) * validation},
    }


def _failed(record: RoundRecord) -> int:
    return sum(not name.endswith("(validation)") for name in record.failures)
