"""Where data sets lie on disk, and what to say where they do not."""

import os
from pathlib import Path

from fedl2p.errors import DataError

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
