"""Checkpoints of the rounds: the last two, written atomically, checked as a whole before anything of them is used."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch

from fedl2p.core.functional import Tensors
from fedl2p.core.statistics import ClientStatistics
from fedl2p.errors import RunFolderError
from fedl2p.federation.state import MetaState, RoundRecord
from fedl2p.io import checksum, read_tensors, write_tensors

FILE_NAME = "rounds.safetensors"
PREVIOUS = "rounds.previous.safetensors"
_NEW = "rounds.new.safetensors"

logger = logging.getLogger(__name__)


def save_state(folder: Path, state: MetaState, *, run: str = "") -> None:
    """Writes the state and keeps the one before; a crash at any time leaves a whole file.

    Args:
        folder: is made if it is not there.
        state: what to keep.
        run: says which run it belongs to, see `load_state`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"lambda/{name}": t for name, t in state.lambda_.items()}
    tensors |= {f"best/{name}": t for name, t in state.best_lambda.items()}
    numbers = {
        "best_loss": state.best_loss,
        "best_round": state.best_round,
        "history": [vars(record) for record in state.history],
    }
    metadata = {"state": json.dumps(numbers), "run": run, "generation": str(state.round)}
    metadata["checksum"] = checksum(tensors, metadata)
    write_tensors(folder / _NEW, tensors, metadata)
    if (folder / FILE_NAME).exists():
        os.replace(folder / FILE_NAME, folder / PREVIOUS)
    os.replace(folder / _NEW, folder / FILE_NAME)


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


def load_state(folder: Path, *, run: str | None = None, template: Tensors | None = None) -> MetaState | None:
    """The state in `folder`, or None if there is none.

    Where the last file is of no use, the one before is taken, and the log says so.

    Args:
        folder: of the checkpoints.
        run: what `save_state` was given: files of another run are refused; None takes any.
        template: lambda, for names, shapes and types; None does not check them.

    Raises:
        RunFolderError: there are files, but none is of use; with the reason.
    """
    refused: RunFolderError | None = None
    for name in (FILE_NAME, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = _load(path, run, template)
        except RunFolderError as error:
            refused = refused or error
            continue
        if refused is not None:
            logger.warning("%s The rounds go on from the checkpoint before, of round %d.", refused, state.round)
        return state
    if refused is not None:
        raise refused
    return None


def _load(path: Path, run: str | None, template: Tensors | None) -> MetaState:
    tensors, metadata = read_tensors(path)
    parts: dict[str, Tensors] = {"lambda": {}, "best": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    if metadata.get("checksum") != checksum(tensors, metadata):
        raise RunFolderError(f"The file {path} is no whole checkpoint of rounds: its checksum is wrong.")
    if run is not None and metadata.get("run") != run:
        raise RunFolderError(f"The file {path} is a checkpoint of another run; its configuration or seed differs.")
    try:
        state = _state(json.loads(metadata["state"]), parts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"The file {path} is no checkpoint of rounds; delete or replace it.") from error
    reason = _unfit(state, template)
    if reason:
        raise RunFolderError(f"The file {path} cannot be resumed from: {reason}.")
    return state


def _state(numbers: dict[str, Any], parts: dict[str, Tensors]) -> MetaState:
    return MetaState(
        lambda_=parts["lambda"],
        best_lambda=parts["best"],
        best_loss=numbers["best_loss"],
        best_round=numbers["best_round"],
        history=[_record(values) for values in numbers["history"]],
    )


def _record(values: dict[str, Any]) -> RoundRecord:
    return RoundRecord(**(values | {key: tuple(values[key]) for key in ("clients", "clipped")}))


def _unfit(state: MetaState, template: Tensors | None) -> str:
    """Why a state that is whole is still none to go on from; empty where it is one."""
    if [record.round for record in state.history] != list(range(len(state.history))):
        return "a round is missing in its history"
    if not isinstance(state.best_round, int) or not 0 <= state.best_round <= max(state.round, 0):
        return f"its best round is {state.best_round!r}"
    if not isinstance(state.best_loss, float) or math.isnan(state.best_loss):
        return f"its best loss is {state.best_loss!r}"
    for lambda_ in (state.lambda_, state.best_lambda):
        expected = template if template is not None else state.lambda_
        if set(lambda_) != set(expected):
            return f"its tensors are not those of lambda ({', '.join(sorted(set(lambda_) ^ set(expected))[:3])})"
        for name, reference in expected.items():
            if (lambda_[name].shape, lambda_[name].dtype) != (reference.shape, reference.dtype):
                return f"'{name}' has another shape or type than lambda's"
            if not bool(torch.isfinite(lambda_[name]).all()):
                return f"'{name}' is not finite"
    return ""
