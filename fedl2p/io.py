"""Files that are whole or not there: text, JSON and tensors, each written in one step and with the same file mode."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fedl2p.errors import RunFolderError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".tmp"
"""How the name of a file ends while it is being written; it begins with a dot."""


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        path: the file; missing folders are made.
        content: text (written as UTF-8) or bytes.

    Returns:
        The path.

    Raises:
        RunFolderError: the folder cannot be written, or the disk is full; an old file is as it was.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    # Beside the target, since os.replace is only atomic inside one file system.
    temporary = target.with_name(f".{target.name}.{uuid4().hex}{TEMPORARY}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise RunFolderError(f"Cannot write {target}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def _sync_folder(folder: Path) -> None:
    """Makes the new name outlast a power failure; not every file system knows how."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporary_files(folder: Path) -> None:
    """Removes what a killed process was writing in `folder` and below."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        with suppress(OSError):
            path.unlink()


def finite_or_none(value: Any) -> Any:
    """A plain value as JSON knows it: keys are text, tuples are lists, numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(content: Any, *, indent: int | None = None) -> str:
    """JSON in which numbers that are not finite are null, since JSON has no other word for them."""
    return json.dumps(finite_or_none(content), indent=indent, allow_nan=False)


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Writes a JSON file for people and programs, see `to_json`.

    Raises:
        RunFolderError: see `write_atomically`.
    """
    return write_atomically(path, to_json(content, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file, or None if there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    file = Path(path)
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"The file {file} is damaged ({error}); delete it to make it anew.") from error


def write_tensors(
    path: str | os.PathLike[str], tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes a safetensors file; the same tensors and metadata always give the same bytes.

    Args:
        path: the file; missing folders are made.
        tensors: by name; they may share memory or lie on any device.
        metadata: texts that are kept beside them.

    Raises:
        RunFolderError: see `write_atomically`.
    """
    import torch
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, as the current and the best lambda may.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return write_atomically(path, _with_metadata(save(copies), metadata or {}))


def _with_metadata(archive: bytes, metadata: Mapping[str, str]) -> bytes:
    """Puts metadata into the header of a safetensors archive in the order of their keys; its own writer shuffles."""
    length = int.from_bytes(archive[:8], "little")
    header = json.loads(archive[8 : 8 + length])
    header = {"__metadata__": dict(sorted(metadata.items()))} | header if metadata else header
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + archive[8 + length :]


def checksum(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> str:
    """A hash of everything in a file of tensors, but of what it keeps as its `checksum`."""
    import torch

    words = sorted((key, value) for key, value in metadata.items() if key != "checksum")
    digest = hashlib.sha256(json.dumps(words).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_tensors(path: str | os.PathLike[str]) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, on the CPU.

    Raises:
        RunFolderError: the file is damaged.
    """
    return read_tensors(path)[0]


def read_tensors(path: str | os.PathLike[str]) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        RunFolderError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as archive:
            # The copies are aligned as fresh tensors are: sums over others round otherwise, and runs would not repeat.
            tensors = {key: archive.get_tensor(key).clone() for key in archive.keys()}  # noqa: SIM118 (not a dict)
            return tensors, archive.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"The file {path} is damaged or no safetensors file ({error}); delete or replace it."
        ) from error
