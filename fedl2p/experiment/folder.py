"""A run's folder: made once, held by one process at a time, never overwritten, every file written whole."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedl2p.errors import RunFolderError
from fedl2p.io import TEMPORARY, read_json, remove_temporary_files, write_atomically, write_json

CONFIG = "config.yaml"
DATA = "checkpoints/data.json"
"""A hash of every client's data, by the client's name."""


class RunFolder:
    """Where a run keeps what DESIGN.md lists.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Names the folder; nothing is touched."""
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """The folder of what a resumed run reads."""
        return self.path / "checkpoints"

    def require_usable(self, *, resume: bool) -> None:
        """Refuses a folder that would lose something.

        Raises:
            RunFolderError: it holds files and is not being resumed, there is nothing to resume, or another process is
                at work in it.
        """
        above = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not above.is_dir():
            raise RunFolderError(
                f"output_dir '{self.path}' cannot be made, since '{above}' is a file; choose a folder."
            )
        if resume and not self.resumable:
            raise RunFolderError(f"output_dir '{self.path}' holds no run to resume; run without --resume.")
        if self.path.is_dir():
            with self._held():
                pass
        if self._is_used() and not resume:
            raise RunFolderError(
                f"output_dir '{self.path}' already holds a run; choose another folder, or add --resume to go on "
                "with it."
            )

    @property
    def resumable(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / CONFIG).is_file()

    def _is_used(self) -> bool:
        """Whether it holds a file; those of a run that was killed while it made the folder do not count."""
        return any(path.is_file() and path.suffix != TEMPORARY for path in self.path.rglob("*"))

    @contextlib.contextmanager
    def opened(self, config_yaml: str, *, resume: bool) -> Iterator[None]:
        """Starts the run's folder, see `start`, and keeps other processes out of it until the end.

        Raises:
            RunFolderError: as `start`; or another process is at work in the folder.
        """
        if not resume:
            self._make()
        with self._held():
            remove_temporary_files(self.path)
            if not resume and self.resumable:
                raise RunFolderError(f"output_dir '{self.path}' already holds a run, which has just begun.")
            self.start(config_yaml, resume=resume)
            yield

    def start(self, config_yaml: str, *, resume: bool) -> None:
        """Makes the folder and writes `config.yaml`, or checks that the resumed run had the same configuration.

        A resumed run that is to have more rounds keeps the new number.

        Raises:
            RunFolderError: the configuration differs, with the first line that does.
        """
        if not resume:
            self._make()
        if not resume or self.require_same(config_yaml):
            write_atomically(self.path / CONFIG, config_yaml)

    def _make(self) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"output_dir '{self.path}' cannot be made: {error.strerror}.") from error

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """A lock on the folder itself, so that it leaves no file; it goes with the process, also with a killed one."""
        if sys.platform == "win32":  # has no such locks
            yield
            return
        import fcntl

        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise RunFolderError(f"output_dir '{self.path}' cannot be read: {error.strerror}.") from error
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunFolderError(
                        f"Another process is at work in output_dir '{self.path}'; wait for its end, or stop it."
                    ) from None
            yield
        finally:
            os.close(descriptor)

    def require_same(self, config_yaml: str) -> bool:
        """Refuses to resume with another configuration; only `federation.rounds` may have grown.

        Returns:
            Whether it has.

        Raises:
            RunFolderError: with the first line that differs.
        """
        path = self.path / CONFIG
        try:
            before = OmegaConf.create(path.read_text(encoding="utf-8"))
            then = OmegaConf.select(before, "federation.rounds")
        except Exception as error:  # YAML's errors have no common base in OmegaConf's interface
            raise RunFolderError(f"The file {path} is damaged ({' '.join(str(error).split())}).") from error
        given = OmegaConf.create(config_yaml)
        now = OmegaConf.select(given, "federation.rounds")
        grown = isinstance(then, int) and isinstance(now, int) and now > then
        if grown:
            OmegaConf.update(before, "federation.rounds", now)
        lines = (OmegaConf.to_yaml(content).splitlines() for content in (before, given))
        for there, here in zip_longest(*lines, fillvalue="nothing"):
            if there != here:
                raise RunFolderError(
                    f"The run in '{self.path}' had another configuration: '{there.strip()}' there, '{here.strip()}' "
                    "now; resume with the same one. Only federation.rounds may grow."
                )
        return grown

    def require_same_data(self, fingerprint: Mapping[str, str]) -> None:
        """Refuses data other than those that the run began with.

        Args:
            fingerprint: a hash of every client's data, by the client's name; see `FederatedDataModule.fingerprint`.

        Raises:
            RunFolderError: with the first client that differs.
        """
        before = self.read_json(DATA)
        if before is None:
            return
        for name in (*fingerprint, *before):
            if fingerprint.get(name) != before.get(name):
                raise RunFolderError(
                    f"The data differ from those that the run in '{self.path}' began with, first at client '{name}'; a "
                    "data module must give the same clients every time: draw from its seed, and leave its files alone."
                )

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file; numbers that are not finite become null."""
        write_json(self.path / name, content)

    def read_json(self, name: str) -> Any:
        """Reads a JSON file, or None if there is none.

        Raises:
            RunFolderError: it is damaged.
        """
        return read_json(self.path / name)
