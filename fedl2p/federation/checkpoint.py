"""Checkpoints of the rounds: one file, written atomically, loaded without unpickling."""

import json
from pathlib import Path
from typing import Any

import torch

from fedl2p.core.functional import Tensors
from fedl2p.core.statistics import ClientStatistics
from fedl2p.errors import RunFolderError
from fedl2p.federation.state import MetaState, RoundRecord
from fedl2p.io import read_tensors, write_tensors

FILE_NAME = "rounds.safetensors"


def save_state(folder: Path, state: MetaState) -> None:
    """Writes the state; a crash leaves the file as it was before.

    Args:
        folder: is made if it is not there.
        state: what to keep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"lambda/{name}": t for name, t in state.lambda_.items()}
    tensors |= {f"best/{name}": t for name, t in state.best_lambda.items()}
    numbers = {
        "best_loss": state.best_loss,
        "best_round": state.best_round,
        "history": [vars(record) for record in state.history],
    }
    write_tensors(folder / FILE_NAME, tensors, {"state": json.dumps(numbers)})


def save_statistics(path: Path, statistics: ClientStatistics) -> None:
    """Keeps a client's statistics for processes that come later."""
    tensors = {"bn_divergence": statistics.bn_divergence, "layer_moments": statistics.layer_moments}
    tensors |= {f"mean/{name}": t for name, t in statistics.channel_mean.items()}
    tensors |= {f"var/{name}": t for name, t in statistics.channel_var.items()}
    # Names in their order: safetensors sorts its own.
    names = json.dumps(list(statistics.channel_mean))
    write_tensors(path, tensors, {"num_samples": str(statistics.num_samples), "batchnorm_names": names})


def load_statistics(path: Path, device: torch.device | str) -> ClientStatistics:
    """What `save_statistics` wrote, on a device.

    Raises:
        RunFolderError: the file is damaged.
    """
    tensors, metadata = read_tensors(path)
    tensors = {name: t.to(device) for name, t in tensors.items()}
    names = json.loads(metadata["batchnorm_names"])
    return ClientStatistics(
        bn_divergence=tensors["bn_divergence"],
        layer_moments=tensors["layer_moments"],
        channel_mean={name: tensors[f"mean/{name}"] for name in names},
        channel_var={name: tensors[f"var/{name}"] for name in names},
        num_samples=int(metadata["num_samples"]),
    )


def load_state(folder: Path) -> MetaState | None:
    """The state in `folder`, or None if there is none.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    tensors, metadata = read_tensors(path)
    parts: dict[str, Tensors] = {"lambda": {}, "best": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    try:
        numbers = json.loads(metadata["state"])
        history = [_record(r) for r in numbers["history"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"The file {path} is no checkpoint of rounds; delete or replace it.") from error
    return MetaState(
        lambda_=parts["lambda"],
        best_lambda=parts["best"],
        best_loss=numbers["best_loss"],
        best_round=numbers["best_round"],
        history=history,
    )


def _record(values: dict[str, Any]) -> RoundRecord:
    # Files of earlier versions have no `clipped`.
    lists = {key: tuple(values.get(key, ())) for key in ("clients", "clipped")}
    return RoundRecord(**(values | lists))
