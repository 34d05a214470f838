"""Every key of the configuration: type, default, and the meaning that its dataclass documents."""

import dataclasses
import enum
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedl2p.errors import ConfigError
from fedl2p.experiment.schema import Config

PLAIN_TYPES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        name: with its sections, `federation.rounds`.
        type: of its value, in words.
        default: as it would stand in a YAML file; None where a configuration must give a value.
        meaning: what it sets.
    """

    name: str
    type: str
    default: str | None
    meaning: str


def configuration_keys(prefix: str = "") -> list[Key]:
    """The keys of a run's configuration, in the order of the schema.

    Args:
        prefix: only the keys whose names begin with it, as `federation`; empty for all.

    Raises:
        ConfigError: no key begins so.
    """
    found = [key for key in _keys_of(Config, "") if key.name.startswith(prefix)]
    if not found:
        sections = ", ".join(field.name for field in dataclasses.fields(Config))
        raise ConfigError(f"No key begins with '{prefix}'; the first parts of the keys are {sections}.")
    return found


def attribute_docs(cls: type) -> dict[str, str]:
    """What the `Attributes:` sections of a class and its bases say of each attribute, each in one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _attribute_section(base.__doc__ or "")
    return docs


def _attribute_section(docstring: str) -> dict[str, str]:
    docs: dict[str, str] = {}
    _, _, section = inspect.cleandoc(docstring).partition("\nAttributes:\n")
    name = ""
    for line in section.splitlines():
        if line.strip() and not line.startswith(" "):
            break  # the next section
        entry = re.match(r" {4}(\w+): (.*)", line)
        if entry:
            name, line = entry.groups()
        if name and line.strip():
            docs[name] = f"{docs.get(name, '')} {line.strip()}".strip()
    return docs


def _keys_of(section: type, prefix: str) -> Iterator[Key]:
    docs, hints = attribute_docs(section), get_type_hints(section)
    for field in dataclasses.fields(section):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _keys_of(hint, f"{name}.")
        else:
            yield Key(name, _type_in_words(hint), _default(field), docs.get(field.name, ""))


def _type_in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in PLAIN_TYPES:
        return PLAIN_TYPES[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(_type_in_words(part) for part in arguments)
    if origin is Literal:
        return " or ".join(str(value) for value in arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " or ".join(hint.__members__)
    if origin in (list, tuple):
        return f"list of {_type_in_words(arguments[0])}s"
    if origin is dict:
        return "keys and values"
    return "any"


def _default(field: dataclasses.Field[Any]) -> str | None:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return None if value is dataclasses.MISSING or value == "???" else _as_yaml(value)


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_as_yaml(item) for item in value)}]"
    return str(value)
