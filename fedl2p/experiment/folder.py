"""A run's folder: made once, never overwritten, every file written whole."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedl2p.errors import RunFolderError
from fedl2p.io import read_json, write_atomically, write_json


class RunFolder:
    """Where a run keeps what DESIGN.md lists.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Names the folder; nothing is touched."""
        self.path = Path(path)

    def require_usable(self, *, resume: bool) -> None:
        """Refuses a folder that would lose something.

        Raises:
            RunFolderError: it holds files and is not being resumed, or there is nothing to resume.
        """
        above = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not above.is_dir():
            raise RunFolderError(
                f"output_dir '{self.path}' cannot be made, since '{above}' is a file; choose a folder."
            )
        used = self.path.is_dir() and any(self.path.iterdir())
        if used and not resume:
            raise RunFolderError(
                f"output_dir '{self.path}' already holds a run; choose another folder, or add --resume to go on "
                "with it."
            )
        if resume and not (self.path / "config.yaml").is_file():
            raise RunFolderError(f"output_dir '{self.path}' holds no run to resume; run without --resume.")

    def start(self, config_yaml: str, *, resume: bool) -> None:
        """Makes the folder and writes `config.yaml`, or checks that the resumed run had the same configuration.

        Raises:
            RunFolderError: the configuration differs, with the first line that does.
        """
        if resume:
            self.require_same(config_yaml)
            return
        try:
            self.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise RunFolderError(f"output_dir '{self.path}' cannot be made: {error.strerror}.") from error
        write_atomically(self.path / "config.yaml", config_yaml)

    def require_same(self, config_yaml: str) -> None:
        """Refuses to resume with another configuration.

        Raises:
            RunFolderError: with the first line that differs.
        """
        before = (self.path / "config.yaml").read_text()
        if before != config_yaml:
            pairs = zip_longest(before.splitlines(), config_yaml.splitlines(), fillvalue="nothing")
            there, now = next((a, b) for a, b in pairs if a != b)
            raise RunFolderError(
                f"The run in '{self.path}' had another configuration: '{there.strip()}' there, '{now.strip()}' now; "
                "resume with the same one."
            )

    @property
    def checkpoints(self) -> Path:
        """The folder of what a resumed run reads."""
        return self.path / "checkpoints"

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file; numbers that are not finite become null."""
        write_json(self.path / name, content)

    def read_json(self, name: str) -> Any:
        """Reads a JSON file, or None if there is none.

        Raises:
            RunFolderError: it is damaged.
        """
        return read_json(self.path / name)
