"""`fedl2p keys`: every key once, with type, default and meaning."""

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from fedl2p.cli import main
from fedl2p.errors import ConfigError
from fedl2p.experiment import keys
from fedl2p.experiment.keys import Key, attribute_docs, configuration_keys
from fedl2p.experiment.schema import Config


def leaves(node: Any, prefix: str = "") -> list[str]:
    """Names of the keys of a schema that hold no section."""
    return [
        name
        for key in node
        for name in (
            leaves(node._get_node(key), f"{prefix}{key}.")
            if OmegaConf.is_config(node._get_node(key)) and OmegaConf.get_type(node._get_node(key)) not in (dict, list)
            else [f"{prefix}{key}"]
        )
    ]


def test_every_key_of_the_schema_is_there_in_its_order() -> None:
    assert [key.name for key in configuration_keys()] == leaves(OmegaConf.structured(Config))


@pytest.mark.parametrize("key", configuration_keys(), ids=lambda key: key.name)
def test_every_key_says_what_it_means(key: Key) -> None:
    assert len(key.meaning) > 10
    assert key.meaning.endswith(".")


def test_types_and_defaults_are_words_of_yaml() -> None:
    found = {key.name: key for key in configuration_keys()}
    assert (found["seed"].type, found["seed"].default) == ("integer", "0")
    assert (found["threads"].type, found["threads"].default) == ("integer or null", "null")
    assert (found["output_dir"].type, found["output_dir"].default) == ("text", None)
    assert (found["baselines.rates"].type, found["baselines.rates"].default) == (
        "list of numbers",
        "[0.01, 0.03, 0.1, 0.3]",
    )
    assert (found["baselines.l2p"].type, found["baselines.l2p"].default) == ("true or false", "true")
    assert (found["trainer"].type, found["trainer"].default) == ("keys and values", "{}")


def test_a_prefix_chooses() -> None:
    names = [key.name for key in configuration_keys("federation.ray")]
    assert names == ["federation.ray.num_cpus", "federation.ray.num_gpus"]


def test_an_unknown_prefix_is_answered_with_the_sections_there_are() -> None:
    with pytest.raises(ConfigError, match="No key begins with 'nothing'; .* federation, baselines"):
        configuration_keys("nothing")


class Colour(enum.Enum):
    """Two words."""

    red = 1
    blue = 2


@dataclass
class Paint:
    """A section.

    Attributes:
        colour: what it looks like,
            said in two lines.
        coats: how many.

    Raises:
        Nothing: not an attribute.
    """

    colour: Colour = Colour.blue
    coats: Literal["one", "two"] = "two"
    names: list[str] = field(default_factory=lambda: ["a"])


def test_attributes_are_read_over_several_lines_up_to_the_next_section() -> None:
    assert attribute_docs(Paint) == {"colour": "what it looks like, said in two lines.", "coats": "how many."}


def test_enums_and_literals_list_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "Config", Paint)
    assert [(key.type, key.default) for key in configuration_keys()] == [
        ("red or blue", "blue"),
        ("one or two", "two"),
        ("list of texts", "[a]"),
    ]


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "federation.patience"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("federation.patience (integer; default 100)\n    ")
    assert "rounds without a lower validation loss" in out


def test_the_command_refuses_an_unknown_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("fedl2p: No key begins with 'nothing'")
