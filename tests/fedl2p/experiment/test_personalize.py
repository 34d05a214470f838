"""`fedl2p personalize`: from a run's folder to a new client's plain model, and nothing written where it cannot be."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_data import image_folder
from tiny_data.images import write_image

import fedl2p
import fedl2p.datamodules
from fedl2p.cli import main
from fedl2p.experiment.build import build_model
from fedl2p.experiment.config import from_yaml
from fedl2p.io import read_tensors
from fedl2p.policy import Policy
from fedl2p.policy import policy as policy_module
from fedl2p.policy.hyperparameters import unusual_inputs
from fedl2p.report.hyperparameters import read_hyperparameters

CONFIGS = Path(fedl2p.__file__).parents[1] / "configs"
SHORT = [
    "client.finetune_epochs=1",
    "client.meta_iterations=1",
    "federation.rounds=1",
    "baselines.l2p=false",
    "baselines.shuffled=false",
    "wandb.mode=disabled",
]
TINY_DIGITS = [
    "data.init_args.seen_clients=6",
    "data.init_args.unseen_clients=6",
    "data.init_args.pretrain_clients=2",
    "data.init_args.train_sizes=[8]",
    "model.init_args.widths=[4, 4, 4]",
    "pretraining.rounds=0",
]

Personalize = Callable[..., int]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on digits."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert main(["run", str(CONFIGS / "digits.yaml"), *TINY_DIGITS, *SHORT, f"output_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on images in folders."""
    folder = tmp_path_factory.mktemp("photos")
    options = [f"{key}={value}" for key, value in image_folder.make(folder / "data").items()]
    path = str(CONFIGS / "image_folder.yaml")
    assert main(["run", path, *options, *SHORT, "pretraining.rounds=0", f"output_dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture
def personalize(tmp_path: Path) -> Personalize:
    """Runs the command with `--out` in a new folder."""
    return lambda run, *arguments: main(["personalize", str(run), "--out", str(tmp_path / "own"), *map(str, arguments)])


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "own" / "report.json").read_text())
    return found


def tiny_digits(folder: Path, *, seed: int = 0) -> Path:
    """A configuration that has data alone."""
    path = folder / "clients.yaml"
    arguments = f"{{seed: {seed}, seen_clients: 6, unseen_clients: 6, pretrain_clients: 2, train_sizes: [8]}}"
    path.write_text(f"data: {{class_path: fedl2p.datamodules.DigitsDataModule, init_args: {arguments}}}\n")
    return path


def test_a_run_keeps_what_a_policy_needs(digits: Path) -> None:
    policy = Policy.load(digits)
    assert policy.settings.finetune_epochs == 1
    rows = [row for row in read_hyperparameters(digits / "hyperparameters.csv") if row["pool"] == "seen"]
    for kind in ("beta", "eta"):
        mean = getattr(policy.mean_recipe, kind)
        for layer, value in mean.items():
            own = [row["value"] for row in rows if (row["kind"], row["layer"]) == (kind, layer)]
            assert len(own) == 6
            assert value == pytest.approx(sum(own) / 6, rel=1e-4)


@pytest.mark.parametrize("client", ["9", "unseen-blur-00"])
def test_a_client_of_a_configuration_gets_a_model_that_fits_the_run_s(
    digits: Path, personalize: Personalize, tmp_path: Path, client: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert personalize(digits, "--data", tiny_digits(tmp_path), "--client", client) == 0
    model = build_model(from_yaml((digits / "config.yaml").read_text()))
    model.load_state_dict(load_file(tmp_path / "own" / "personalized.safetensors"), strict=True)
    report = report_of(tmp_path)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [
        "hyperparameters.csv",
        "personalized.safetensors",
        "report.json",
    ]
    rows = read_hyperparameters(tmp_path / "own" / "hyperparameters.csv")
    assert [row["layer"] for row in rows if row["kind"] == "eta"] == [name for name, _ in model.named_parameters()]
    assert {row["client"] for row in rows} == {report["client"]}
    assert report["samples"]["train"] == 8
    assert 0 <= report["measured"]["test"]["personalized"]["accuracy"] <= 1
    assert f"{100 * report['measured']['test']['global']['accuracy']:.1f} %" in capsys.readouterr().out


def test_its_recipe_is_that_of_the_run_for_the_same_client(
    digits: Path, personalize: Personalize, tmp_path: Path
) -> None:
    """The clients of the same seed are those of the run, whose recipes are in its folder."""
    assert personalize(digits, "--data", tiny_digits(tmp_path), "--client", "unseen-noise-00") == 0
    ran = [r for r in read_hyperparameters(digits / "hyperparameters.csv") if r["client"] == "unseen-noise-00"]
    own = read_hyperparameters(tmp_path / "own" / "hyperparameters.csv")
    assert [r["layer"] for r in own] == [r["layer"] for r in ran]
    assert [r["value"] for r in own] == pytest.approx([r["value"] for r in ran], rel=1e-4, abs=1e-6)


def test_the_same_command_gives_the_same_files(digits: Path, tmp_path: Path) -> None:
    asked = ["personalize", str(digits), "--data", str(tiny_digits(tmp_path)), "--client", "3"]
    for folder in ("one", "two"):
        assert main([*asked, "--out", str(tmp_path / folder)]) == 0
    for name in ("personalized.safetensors", "hyperparameters.csv", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_mean_recipe_refined(digits: Path, personalize: Personalize, tmp_path: Path) -> None:
    data = tiny_digits(tmp_path)
    assert personalize(digits, "--data", data, "--client", "3", "--mean-recipe", "--refine") == 0
    report = report_of(tmp_path)
    assert report["recipe"] == "mean of the seen clients, refined"
    assert min(report["refinement_losses"]) <= report["refinement_losses"][0]
    betas = [row["value"] for row in read_hyperparameters(tmp_path / "own" / "hyperparameters.csv")][:3]
    mean = Policy.load(digits).mean_recipe
    assert mean is not None
    assert betas == pytest.approx(list(mean.beta.values()))


def images(folder: Path, classes: tuple[str, ...] = ("cat", "owl"), count: int = 4) -> Path:
    for label in classes:
        for number in range(count):
            write_image(folder / label / f"{number}.png", seed=number)
    return folder


def test_a_folder_of_images_is_one_client(photos: Path, personalize: Personalize, tmp_path: Path) -> None:
    assert personalize(photos, "--data", images(tmp_path / "mine")) == 0
    report = report_of(tmp_path)
    assert (report["client"], report["samples"]) == ("mine", {"train": 8, "val": 0, "test": 0})
    assert report["measured"] == {}


def test_a_folder_can_hold_data_for_testing(photos: Path, personalize: Personalize, tmp_path: Path) -> None:
    for role in ("train", "test"):
        images(tmp_path / "mine" / role)
    assert personalize(photos, "--data", tmp_path / "mine") == 0
    report = report_of(tmp_path)
    assert report["samples"] == {"train": 8, "val": 0, "test": 8}
    assert list(report["measured"]) == ["test"]


# What is wrong, in one line, with nothing written


def refused(code: int, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    assert code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "Loading ..."]
    assert len(lines) == 1, lines
    assert not list(folder.rglob("*own*"))
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "DATA"], "--client is missing"),
        (["--data", "DATA", "--client", "99"], "--client is '99'; allowed are 0 to 13"),
        (["--data", "DATA", "--client", "nobody"], "--client is 'nobody'"),
        (["--data", "nowhere.yaml", "--client", "1"], "'nowhere.yaml' does not exist"),
        (["--data", "digitz", "--client", "1"], "'digitz' is no file and no configuration"),
        (["--data", "FOLDER"], "are no image files"),
        (["--data", "FOLDER", "--client", "1"], "a folder of images is one client"),
    ],
)
def test_a_wrong_question(
    digits: Path,
    personalize: Personalize,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    places = {"DATA": str(tiny_digits(tmp_path)), "FOLDER": str(images(tmp_path / "mine"))}
    code = personalize(digits, *(places.get(argument, argument) for argument in arguments))
    assert words in refused(code, capsys, tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: images(folder, ("cat", "zebra")), "class 'zebra'; the run knows cat, dog, owl"),
        (lambda folder: folder.mkdir(), "holds no images"),
        (lambda folder: images(folder, ("owl",), 1), "at least two"),
        (lambda folder: (images(folder) / "cat" / "9.png").write_bytes(b"no image"), "9.png"),
    ],
)
def test_images_of_no_use(
    photos: Path,
    personalize: Personalize,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], object],
    words: str,
) -> None:
    make(tmp_path / "mine")
    assert words in refused(personalize(photos, "--data", tmp_path / "mine"), capsys, tmp_path)


def test_data_of_another_shape(
    photos: Path, personalize: Personalize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = personalize(photos, "--data", tiny_digits(tmp_path), "--client", "1")
    assert "(1, 8, 8); the policy was learned with (3, 16, 16)" in refused(code, capsys, tmp_path)


def test_no_run(personalize: Personalize, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = personalize(tmp_path / "empty", "--data", "digits", "--client", "1")
    assert "is not the folder of a run" in refused(code, capsys, tmp_path)


@pytest.mark.parametrize("file", ["meta_nets.safetensors", "global_model.safetensors", "config.yaml"])
def test_a_damaged_run(
    digits: Path, personalize: Personalize, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("meta_nets.safetensors", "global_model.safetensors", "config.yaml", "mean_recipe.safetensors"):
        content = (digits / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(content[: len(content) // 2] if name == file else content)
    code = personalize(tmp_path / "run", "--data", tiny_digits(tmp_path), "--client", "1")
    assert refused(code, capsys, tmp_path)


def test_a_folder_that_holds_files_is_left_alone(
    digits: Path, personalize: Personalize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own").mkdir()
    asked = digits, "--data", tiny_digits(tmp_path), "--client", "1"
    (tmp_path / "own" / "file").write_text("precious")
    assert personalize(*asked) == 2
    assert "holds files already" in capsys.readouterr().err
    (tmp_path / "own" / "file").unlink()
    assert personalize(*asked) == 0


def test_an_older_run_has_no_mean_recipe(
    digits: Path, personalize: Personalize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("meta_nets.safetensors", "global_model.safetensors", "config.yaml"):
        (tmp_path / "run" / name).write_bytes((digits / name).read_bytes())
    asked = tmp_path / "run", "--data", tiny_digits(tmp_path), "--client", "1"
    assert "kept no mean recipe" in refused(personalize(*asked, "--mean-recipe"), capsys, tmp_path)
    assert personalize(*asked) == 0


def test_a_client_unlike_the_seen_ones_is_one_line(
    digits: Path,
    personalize: Personalize,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy_module, "unusual_inputs", partial(unusual_inputs, bound=1e-3))
    assert personalize(digits, "--data", tiny_digits(tmp_path), "--client", "1") == 0
    assert "Warning: This client is unlike the clients" in capsys.readouterr().err
    assert report_of(tmp_path)["warnings"]


def test_the_policy_s_file_has_no_code_in_it(digits: Path) -> None:
    tensors, metadata = read_tensors(digits / "meta_nets.safetensors")
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    assert json.loads(metadata["input_shape"]) == [1, 8, 8]


# What docs/new_client.md shows

PAGE = (CONFIGS.parent / "docs" / "new_client.md").read_text()


def test_the_page_s_command_runs(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = [line.split() for line in PAGE.splitlines() if line.startswith("    fedl2p personalize ")]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    assert main(command[1:]) == 0
    assert (tmp_path / "personalized" / "personalized.safetensors").is_file()


def test_the_page_s_code_runs(digits: Path) -> None:
    blocks = [part for part in PAGE.split("\n\n") if part.startswith("    from fedl2p") or "policy = Policy" in part]
    code = "\n".join(line.removeprefix("    ") for line in "\n".join(blocks).splitlines())
    model = build_model(from_yaml((digits / "config.yaml").read_text())).eval()
    model.load_state_dict(load_file(digits / "global_model.safetensors"))
    loader = fedl2p.datamodules.DigitsDataModule().client(0).train_dataloader()
    names: dict[str, Any] = {"model": model, "loader": loader}
    exec(code.replace("runs/digits", str(digits)), names)
    assert list(names["hyperparameters"].eta) == [name for name, _ in model.named_parameters()]
    model.load_state_dict(names["personalized"].state_dict(), strict=True)
