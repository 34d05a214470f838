"""What README and the documents tell a reader to write and to run, written and run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fedl2p

ROOT = Path(fedl2p.__file__).parents[1]


def blocks(page: str) -> list[str]:
    """The indented blocks of a page, without their indentation."""
    found: list[list[str]] = [[]]
    for line in [*(ROOT / page).read_text().splitlines(), "end"]:
        if line.startswith("    "):
            found[-1].append(line[4:])
        elif not line and found[-1]:
            found[-1].append("")
        elif found[-1]:
            found.append([])
    return ["\n".join(lines).strip() + "\n" for lines in found if lines]


def python_of(page: str) -> list[str]:
    """The blocks of a page that are programs."""
    return [block for block in blocks(page) if block.startswith(("import ", "from "))]


COMMANDS = [line for block in blocks("README.md") for line in block.splitlines() if line.startswith("fedl2p ")]
PYTHON = python_of("README.md")
WITH_A_RUN = {"new_client.md"}  # its program needs a finished run, which test_personalize.py has
PROGRAMS = {
    f"{page.name} {number}": code
    for page in sorted((ROOT / "docs").glob("*.md"))
    for number, code in enumerate(python_of(f"docs/{page.name}"))
    if "..." not in code and page.name not in WITH_A_RUN
}


def run(folder: Path, *arguments: str) -> None:
    """Runs `python ...` in a folder, with the clone's package."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr


def test_there_is_something_to_run() -> None:
    assert len(COMMANDS) >= 2
    assert len(PYTHON) == 2


def test_the_data_set_is_that_of_the_example() -> None:
    assert PYTHON[0] in (ROOT / "examples" / "own_data.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_runs(command: str, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "own_data.py").write_text(PYTHON[0])
    arguments = shlex.split(command.replace("accelerator=gpu", "accelerator=cpu"))[1:]
    run(tmp_path, "-m", "fedl2p.cli", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=["own data", "one client"])
def test_each_piece_of_code_runs(code: str, tmp_path: Path) -> None:
    run(tmp_path, "-c", code)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_of_the_documents_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "program.py").write_text(PROGRAMS[name])
    run(tmp_path, "program.py")
