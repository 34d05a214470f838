"""Weight files: safetensors and torch checkpoints, read without unpickling code, and fitted to a model or refused."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedl2p.errors import ModelError

_SHOWN = 3  # keys that an error names
_WRAPPINGS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "model.")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a weight file, by name.

    A checkpoint may hold them under `state_dict` or `model`, beside other things, and with the prefix that
    `DataParallel` gives to names.

    Args:
        path: a `.safetensors` file, or what `torch.save` wrote.

    Raises:
        ModelError: there is no such file, it is cut off or damaged, it would have to run code to be read, or it holds
            no tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"The weight file '{file}' does not exist.")
    content: Any = _safetensors(file) if file.suffix == ".safetensors" else _checkpoint(file)
    for wrapping in _WRAPPINGS:
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"The weight file '{file}' holds no tensors by name; allowed is the state dict of a model.")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return content


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        # The copies are aligned as fresh tensors are: sums over others round otherwise, and runs would not repeat.
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The weight file '{file}' is damaged or no safetensors file: {error}.") from error


def _checkpoint(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of other pickle protocols, which fail or not
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "global" in str(error).lower():
            raise ModelError(
                f"The weight file '{file}' holds more than tensors and plain values, and loading it could run code; "
                "save the model's state_dict() alone, best as safetensors."
            ) from error
        raise ModelError(f"The weight file '{file}' is damaged or no torch checkpoint.") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"The weight file '{file}' is cut off, damaged, or no torch checkpoint.") from error


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, head: str | None = None) -> None:
    """Fills a model from a weight file, wholly.

    Args:
        model: is changed.
        path: see `read_weights`.
        head: name of the last layer. Where that layer has another number of outputs in the file, which is trained for
            another task, it keeps the model's own new values; nothing else may differ.

    Raises:
        ModelError: as `read_weights`; or tensors are missing, too many or of another shape, with the first of them.
    """
    found, wanted = read_weights(path), model.state_dict()
    # Files from before torch 0.4.1 do not count batches.
    lacking = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    extra = [name for name in found if name not in wanted]
    other = {name: t for name, t in found.items() if name in wanted and t.shape != wanted[name].shape}
    if head is not None and other and all(_other_classes(name, head, t, wanted[name]) for name, t in other.items()):
        found = {name: t for name, t in found.items() if name not in other}
        other = {}
    complaints = [f"{len(names)} {what}: {_first(names)}" for what, names in (("missing", lacking), ("unknown", extra))]
    complaints = [text for text, names in zip(complaints, (lacking, extra), strict=True) if names]
    if other:
        shapes = [f"{name} {tuple(t.shape)} for {tuple(wanted[name].shape)}" for name, t in other.items()]
        complaints.append(f"{len(other)} of another shape: {_first(shapes)}")
    if complaints:
        raise ModelError(f"The weights in '{path}' do not fit {type(model).__name__}: {'; '.join(complaints)}.")
    model.load_state_dict(found, strict=False)


def _other_classes(name: str, head: str, found: Tensor, wanted: Tensor) -> bool:
    return name.startswith(f"{head}.") and found.shape[1:] == wanted.shape[1:]


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
