"""Where data sets lie on disk, what to say where they do not, and how they get there."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from fedl2p.errors import DataError
from fedl2p.progress import ProgressBar

Item = TypeVar("Item")

ENVIRONMENT = "FEDL2P_DATA"
"""The environment variable that names the folder of all data sets; `data` in the working directory otherwise."""


def data_folder(root: str | os.PathLike[str] | None, name: str) -> Path:
    """The place of one data set.

    Args:
        root: As the user gave it: the data set's own folder or file; None looks for `name` in `FEDL2P_DATA`.
        name: The data set's folder or file there.
    """
    if root is not None:
        return Path(root).expanduser()
    return Path(os.environ.get(ENVIRONMENT) or "data").expanduser() / name


def missing_data(what: str, *, looked_for: Path | str, get: str) -> DataError:
    """The error for data that are not there.

    Args:
        what: The data set's name.
        looked_for: The file or folder that is missing.
        get: What to download, from where, and where to put it; a full sentence.
    """
    return DataError(
        f"{what} is not there: {looked_for} is missing. {get} Another place can be named by data.init_args.root, or "
        f"for all data sets by the environment variable {ENVIRONMENT}."
    )


def with_bar(items: Sequence[Item], description: str, *, patience: float = 2.0) -> Iterator[Item]:
    """The items in order, with a bar on standard error where they take long and it is a terminal.

    Args:
        items: What takes time between one and the next.
        description: Left of the bar, such as "Reading images".
        patience: Seconds after which the bar appears; it goes when all is done.
    """
    bar, start = ProgressBar(description, len(items), transient=True), time.monotonic()
    try:
        for item in items:
            if time.monotonic() - start >= patience:
                bar.start()
            yield item
            bar.advance()
    finally:
        bar.stop()


def download(url: str, path: Path, *, sha256: str) -> None:
    """Fetches a file, going on where an earlier attempt was cut off, with a bar on standard error.

    The file appears under its name when it is complete and right; until then it is `<name>.part`.

    Args:
        url: Where from.
        path: Where to; its folder is made.
        sha256: Of the whole file, in hexadecimal digits.

    Raises:
        DataError: If it cannot be fetched (what has come is kept), or is another file (nothing is kept).
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part)
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise DataError(
            f"{url} cannot be downloaded: {error}. Run again to go on, or fetch it elsewhere and put it at {path}."
        ) from error
    if found != sha256:
        part.unlink()
        raise DataError(f"{url} has the SHA-256 sum {found}, not {sha256}: it is not the file that was published.")
    os.replace(part, path)


def _fetch(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # all of it is there already
            error.close()
            return
        raise
    with response:
        resumed = response.status == 206
        rest = int(response.headers.get("Content-Length") or 0)
        done, total = start * resumed, rest + start * resumed
        bar = ProgressBar("Downloading", total or None, done=done, unit="bytes", transient=True)
        with part.open("ab" if resumed else "wb") as file, bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.advance(len(block))
        if rest and part.stat().st_size != total:
            raise OSError("the connection was cut off")
