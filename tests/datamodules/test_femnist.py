"""FEMNIST in LEAF's layout, and as a folder of images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_round import run_one_round
from tiny_data import femnist as tiny

from fedl2p.datamodules import FEMNISTDataModule
from fedl2p.datamodules.base.arrays import labels_of
from fedl2p.errors import DataError


def module(root: Path, **options: Any) -> FEMNISTDataModule:
    settings: dict[str, Any] = {"seen_clients": 3, "unseen_clients": 1, "pretrain_clients": 1, "min_samples": 10}
    return FEMNISTDataModule(root, **(settings | options))


@pytest.mark.parametrize("write", [tiny.write, tiny.write_images])
def test_a_client_is_a_writer_with_all_images_of_both_splits(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    data = module(tmp_path)
    assert data.num_classes == 62 and data.input_shape == (1, 28, 28)
    assert {client.name.partition("-")[2] for client in data.clients} == set(tiny.WRITERS)
    for client in data.clients:
        pixels, labels = tiny.writer_images(tiny.WRITERS.index(client.name.partition("-")[2]), 20)
        roles = (client.train, client.val, client.test)
        found = {(int(y), bytes((x * 255).round().byte().numpy())) for role in roles for x, y in role}
        assert found == {(int(y), bytes(x)) for x, y in zip(pixels, labels, strict=True)}
        assert [len(role) for role in roles] == [13, 3, 4]


@pytest.mark.parametrize("folder", ["all_data", "."])
def test_files_that_were_not_split_are_read(tmp_path: Path, folder: str) -> None:
    tiny.write(tmp_path / "made")
    (tmp_path / "root" / folder).mkdir(parents=True)
    for path in (tmp_path / "made" / "train").glob("*.json"):
        path.rename(tmp_path / "root" / folder / path.name)
    assert sum(len(labels_of(client.train)) for client in module(tmp_path / "root").clients) == 5 * 11


def test_missing_files_say_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"FEMNIST is not there: .*preprocess\.sh .*TalwalkarLab/leaf.*FEDL2P_DATA"):
        module(tmp_path / "nowhere").prepare_data()


def broken(change: str) -> str:
    own: dict[str, Any] = {"x": [[0.5] * 784] * 2, "y": [1, 2]}
    if change == "image":
        own["x"] = [[0.5] * 783] * 2
    if change == "label":
        own["y"] = [1, 62]
    if change == "count":
        own["y"] = [1]
    content: Any = {"user_data": {"w": own}}
    if change == "key":
        content = {"users": ["w"]}
    if change == "list":
        content = [1]
    text = json.dumps(content)
    return text[:-10] if change == "cut" else text


@pytest.mark.parametrize("change", ["cut", "key", "list", "image", "label", "count"])
def test_broken_files_are_named(tmp_path: Path, change: str) -> None:
    (tmp_path / "all_data_0.json").write_text(broken(change))
    with pytest.raises(DataError, match=r"all_data_0\.json"):
        module(tmp_path).setup()


@pytest.mark.parametrize("name", ["writer.png", "writer_3.png", "w_x_3.png", "w_62_3.png"])
def test_images_with_other_names_are_named(tmp_path: Path, name: str) -> None:
    tiny.write_images(tmp_path)
    (tmp_path / f"{tiny.WRITERS[0]}_0_0.png").rename(tmp_path / name)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        module(tmp_path).setup()


def test_one_can_train_on_it(tmp_path: Path) -> None:
    tiny.write(tmp_path / "data")
    options = {"root": str(tmp_path / "data"), "seen_clients": 3, "unseen_clients": 1, "min_samples": 10}
    methods = run_one_round("fedl2p.datamodules.FEMNISTDataModule", options, tmp_path / "run", num_classes=62)
    assert len(methods["fedl2p"]["seen"]["clients"]) == 3
    assert np.isfinite(methods["fedl2p"]["unseen"]["loss"]["mean"])
