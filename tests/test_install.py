"""Built and installed, the package has what it needs, takes no name of the user's, and works outside a clone."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fedl2p

ROOT = Path(fedl2p.__file__).parents[1]
PARTS = ("fedl2p", "datamodules", "callbacks", "configs", "pyproject.toml", "README.md", "LICENSE")
CONFIGS = {f"fedl2p/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
TINY = [
    "pretraining.rounds=1",
    "client.finetune_epochs=1",
    "federation.rounds=1",
    "baselines.l2p=false",
    "wandb.mode=disabled",
]
MINE = """\
import torch
from torch.utils.data import TensorDataset

from fedl2p.datamodules import ClientData, FederatedDataModule


class MyData(FederatedDataModule):
    num_classes = 2

    def build_clients(self):
        generator = torch.Generator().manual_seed(self.seed)
        for pool in ("pretrain", "seen", "unseen"):
            for i in range(2):
                x = torch.randn(24, 1, 8, 8, generator=generator)
                y = (x.mean((1, 2, 3)) > 0).long()
                parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 8), (8, 16), (16, 24))]
                yield ClientData(name=f"{pool}-{i}", pool=pool, train=parts[0], val=parts[1], test=parts[2])
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("install")]  # one environment for all of them


def run(*command: str | Path, cwd: Path, succeeds: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a program that sees no clone on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert not succeeds or done.returncode == 0, done.stdout + done.stderr
    return done


def backend(call: str, source: Path, target: Path) -> Path:
    """Calls the build backend that pyproject.toml names, as `pip` and `build` do; returns the file that it made."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"import setuptools.build_meta as backend; backend.{call}({str(target)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (made,) = [path for path in target.iterdir() if path.is_file()]
    return made


def copy_of_the_checkout(target: Path) -> Path:
    """What is built, its links kept as links; building leaves files behind."""
    target.mkdir(exist_ok=True)
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target / part, symlinks=True)
        else:
            shutil.copy(ROOT / part, target / part)
    return target


def installed(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment that has the wheel, and the big packages of the tests' environment."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site_packages = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).stdout.strip()
    # Only the folder goes on the path: what .pth files there install, as an editable fedl2p, does not come along.
    (Path(site_packages) / "big_packages.pth").write_text(str(Path(torch.__file__).parents[1]))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution of the checkout, built from a copy of it, its links kept."""
    return backend(
        "build_sdist", copy_of_the_checkout(tmp_path_factory.mktemp("checkout")), tmp_path_factory.mktemp("sdist")
    )


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the source distribution."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return backend("build_wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment where the wheel is installed; the big packages are those of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    site_packages = Path(
        run(interpreter, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).stdout[:-1]
    )
    # Only the folder goes on the path: what .pth files there install, as an editable fedl2p, does not come along.
    (site_packages / "big_packages.pth").write_text(str(Path(torch.__file__).parents[1]))
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return interpreter


def test_the_source_distribution_holds_configurations_types_and_packages(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= CONFIGS | {"fedl2p/py.typed", "fedl2p/datamodules/base/federated.py", "LICENSE"}


def test_the_wheel_holds_them_too_and_one_top_level_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= CONFIGS | {
        "fedl2p/py.typed",
        "fedl2p/datamodules/base/federated.py",
        "fedl2p/callbacks/progress.py",
    }
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"fedl2p"}


def test_the_installed_package_is_the_one_that_is_used(python: Path, tmp_path: Path) -> None:
    code = "import fedl2p; print(fedl2p.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path).stdout.strip()).is_relative_to(python.parents[1])


@pytest.mark.parametrize("name", ["datamodules", "callbacks", "configs"])
def test_the_user_s_names_are_left_free(python: Path, tmp_path: Path, name: str) -> None:
    done = run(python, "-c", f"import {name}", cwd=tmp_path, succeeds=False)
    assert f"No module named '{name}'" in done.stderr


def test_a_configuration_runs_by_name_outside_a_clone(python: Path, tmp_path: Path) -> None:
    sizes = ["data.init_args.seen_clients=6", "data.init_args.unseen_clients=6", "data.init_args.pretrain_clients=2"]
    small = ["data.init_args.train_sizes=[8]", "model.init_args.widths=[4, 4, 4]"]
    run(python.parent / "fedl2p", "run", "digits", *sizes, *small, *TINY, "output_dir=out", cwd=tmp_path)
    assert (tmp_path / "out" / "results.json").is_file()


def test_the_command_lists_the_configurations_outside_a_clone(python: Path, tmp_path: Path) -> None:
    out = run(python.parent / "fedl2p", "configs", cwd=tmp_path).stdout
    assert all(Path(name).stem in out.splitlines() for name in CONFIGS)


def test_a_project_with_datamodules_and_callbacks_of_its_own_works_beside_ours(python: Path, tmp_path: Path) -> None:
    for package in ("datamodules", "callbacks"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "datamodules" / "mine.py").write_text(MINE)
    data = ["data.class_path=datamodules.mine.MyData", "model.init_args={num_classes: 2, widths: [4, 4]}"]
    run(python.parent / "fedl2p", "run", "digits", *data, *TINY, "output_dir=out", cwd=tmp_path)
    assert (tmp_path / "out" / "results.json").is_file()
    ours = ["data.class_path=datamodules.DigitsDataModule", "data.init_args={seen_clients: 6}"]
    assert "blur" in run(python.parent / "fedl2p", "data", "digits", *ours, cwd=tmp_path).stdout


def test_type_checkers_take_the_installed_package_s_types(python: Path, tmp_path: Path) -> None:
    code = "from fedl2p.seeding import derive_seed\nreveal_type(derive_seed)\n"  # a module that imports little
    (tmp_path / "use.py").write_text(code)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", python, "--follow-imports=silent", "use.py"]
    assert "-> int" in run(*mypy, cwd=tmp_path).stdout.replace("builtins.", "")


def test_an_editable_installation_finds_all_three_folders(tmp_path: Path) -> None:
    source = copy_of_the_checkout(tmp_path / "clone")
    python = installed(backend("build_editable", source, tmp_path / "wheel"), tmp_path / "environment")
    code = "import fedl2p.datamodules.io.files as files; print(files.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path).stdout.strip()).is_relative_to(source)
    assert "digits" in run(python, "-m", "fedl2p.cli", "configs", cwd=tmp_path).stdout.splitlines()
