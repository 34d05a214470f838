"""Whole files or none."""

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from fedl2p.errors import RunFolderError


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        path: the file; missing folders are made.
        content: text (written as UTF-8) or bytes.

    Returns:
        The path.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    # Beside the target, since os.replace is only atomic inside one file system.
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise RunFolderError(f"Cannot write {target}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target
