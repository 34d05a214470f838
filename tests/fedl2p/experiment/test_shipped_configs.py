"""Configurations that come with the package are found by name, wherever the command is started."""

from pathlib import Path

import pytest

from fedl2p.cli import main
from fedl2p.errors import ConfigError
from fedl2p.experiment.config import load_config
from fedl2p.experiment.shipped_configs import FOLDER, configuration_path, shipped_configs


def test_every_file_is_listed_with_what_it_is_and_how_long_it_takes() -> None:
    shipped = shipped_configs()
    assert [config.name for config in shipped] == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    for config in shipped:
        assert len(config.what) > 20
        assert config.time


def test_the_header_is_read_over_several_lines_and_without_its_marks() -> None:
    (digits,) = [config for config in shipped_configs() if config.name == "digits"]
    assert digits.what.startswith("the whole main job on 1,797 real handwritten digits")
    assert digits.time == "under 3 minutes on 2 cores, without a GPU."
    assert not any(mark in config.what + config.time for config in shipped_configs() for mark in ("#", "Run:"))


def test_a_bare_name_is_the_file_that_comes_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(["digits", "seed=3"])
    assert config.seed == 3
    assert config.data.class_path == "fedl2p.datamodules.DigitsDataModule"


def test_a_file_of_the_user_comes_before_one_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("seed: 5")
    assert configuration_path("digits") == Path("digits")
    assert configuration_path("digits").is_file()


def test_a_folder_of_that_name_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    assert configuration_path("digits") == FOLDER / "digits.yaml"


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match="'digit' is no file .* those are cifar10, cifar10c, digits"):
        configuration_path("digit")


@pytest.mark.parametrize("path", ["nowhere.yaml", "configs/nowhere", "./digits"])
def test_what_looks_like_a_path_is_not_looked_up(path: str) -> None:
    assert configuration_path(path) == Path(path)


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    out = capsys.readouterr().out
    for config in shipped_configs():
        assert f"\n{config.name}\n" in f"\n{out}"
        assert " ".join(f"Time: {config.time}".split()) in " ".join(out.split())
