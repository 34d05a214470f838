"""The configurations that come with the package, by name."""

from dataclasses import dataclass
from pathlib import Path

from fedl2p.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class ShippedConfig:
    """A configuration file that comes with the package.

    Attributes:
        name: of the file, without its suffix.
        what: what it runs.
        time: how long a run takes.
    """

    name: str
    what: str
    time: str


def shipped_configs() -> list[ShippedConfig]:
    """The configurations that come with the package, in alphabetical order, as their header comments describe them."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        header = _header(path.read_text(encoding="utf-8"))
        found.append(ShippedConfig(path.stem, header.get("What", ""), header.get("Time", "")))
    return found


def configuration_path(argument: str) -> Path:
    """The file that an argument of the command line names.

    Args:
        argument: the path of a file, or the bare name of a configuration that comes with the package, `digits`.

    Raises:
        ConfigError: it is a bare name, and neither a file nor a configuration that comes with the package.
    """
    path = Path(argument)
    if path.is_file() or path.suffix or path.name != argument:
        return path
    shipped = FOLDER / f"{argument}.yaml"
    if not shipped.is_file():
        names = ", ".join(config.name for config in shipped_configs())
        raise ConfigError(f"'{argument}' is no file and no configuration that comes with fedl2p; those are {names}.")
    return shipped


def _header(text: str) -> dict[str, str]:
    """The parts `What`, `Run` and `Time` of the comment at a file's beginning, each in one line."""
    parts: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        content = line.removeprefix("#").strip()
        first, colon, rest = content.partition(": ")
        if colon and first in ("What", "Run", "Time"):
            name, content = first, rest.strip()
        parts[name] = f"{parts.get(name, '')} {content}".strip()
    return parts
