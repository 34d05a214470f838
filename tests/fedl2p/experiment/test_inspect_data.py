"""`fedl2p data` on the digits and on a user's own classes."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fedl2p.cli import main
from fedl2p.datamodules import ClientData, DigitsDataModule, FederatedDataModule
from fedl2p.errors import DataError
from fedl2p.experiment.inspect_data import class_names, read_split

DIGITS = str(Path(__file__).parents[3] / "configs" / "digits.yaml")


class Two(FederatedDataModule):
    """Two clients, the unseen one first; the label of the last sample is given."""

    num_classes = 3

    def __init__(self, *, last: int = 2) -> None:
        super().__init__()
        self.last = last

    def build_clients(self) -> Iterable[ClientData]:
        labels = torch.tensor([0, 1, 1, self.last])
        own = TensorDataset(torch.zeros(4, 1), labels)
        for pool in ("unseen", "seen"):
            yield ClientData(name=f"{pool}-0", pool=pool, train=own, val=own, test=own, details={"tilt": 1.0})


def test_what_each_client_has_is_read() -> None:
    first, second = read_split(Two())
    assert (first.name, second.name) == ("seen-0", "unseen-0")
    assert first.counts.tolist() == [[1, 2, 1]] * 3 and first.details == {"tilt": 1.0}


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_classes_is_named(label: int) -> None:
    with pytest.raises(DataError, match=f"'unseen-0' has the label {label} in train; labels are 0 to 2"):
        read_split(Two(last=label))


def test_all_samples_of_the_digits_are_counted() -> None:
    data = DigitsDataModule(seed=3)
    counted = sum(int(client.counts.sum()) for client in read_split(data))
    assert counted == sum(sum(data.client_sizes(i)) for i in range(len(data.clients)))
    assert class_names(data) == [str(label) for label in range(10)]


def test_the_command_prints_the_split_and_writes_the_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "split.png"
    assert main(["data", DIGITS, f"output_dir={tmp_path / 'run'}", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    for words in ("Clients", "Labels", "Domains", "Pools", "seen-noise-00", "inversion", "66 more seen", str(picture)):
        assert words in printed
    with Image.open(picture) as opened:
        assert len(np.unique(np.asarray(opened.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert not (tmp_path / "run").exists()


def test_the_picture_goes_beside_the_run_and_all_clients_can_be_listed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["data", DIGITS, f"output_dir={tmp_path / 'run'}", "--all"]) == 0
    assert (tmp_path / "run-data.png").is_file() and not (tmp_path / "run").exists()
    assert "unseen-inversion-05" in capsys.readouterr().out


def test_a_picture_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "split.png").write_bytes(b"mine")
    assert main(["data", DIGITS, "--picture", str(tmp_path / "split.png")]) == 2
    assert "exists already; name another by --picture" in capsys.readouterr().err
    assert (tmp_path / "split.png").read_bytes() == b"mine"


def test_missing_data_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = str(Path(DIGITS).with_name("femnist.yaml"))
    assert main(["data", config, f"data.init_args.root={tmp_path}", f"output_dir={tmp_path / 'run'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "FEMNIST is not there" in line and "preprocess.sh" in line
    assert not list(tmp_path.iterdir())
