"""DomainNet as its archives and lists are published."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_round import run_one_round
from tiny_data import domainnet

from fedl2p.datamodules import DomainNetDataModule
from fedl2p.datamodules.base.arrays import labels_of
from fedl2p.datamodules.domainnet import CLASSES, DOMAINS
from fedl2p.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six to eight training images and three test images of each class and domain."""
    domainnet.make(tmp_path / "domainnet")
    return tmp_path / "domainnet"


def test_clients_domains_and_sizes(folder: Path) -> None:
    module = DomainNetDataModule(folder, image_size=8, clients_per_domain=3)
    module.prepare_data()
    module.setup()
    assert len(module.clients) == len(module.pool("seen")) == 18
    assert [client.domain for client in module.clients[::3]] == list(DOMAINS)
    assert {(row["train"], row["val"], row["test"]) for row in module.describe()} == {(16, 4, 10)}
    assert module.num_classes == 10 and module.input_shape == (3, 8, 8)


def test_the_papers_federation_is_the_default() -> None:
    module = DomainNetDataModule()
    assert module.clients_per_domain * len(module.domains or ()) == 150
    assert module.classes == CLASSES and len(CLASSES) == 10 and module.val_fraction == 0.2
    assert module.equal_domains and module.unseen_clients_per_domain == 0


def test_training_images_come_from_the_one_list_and_test_images_from_the_other(folder: Path) -> None:
    found = {domain.name: domain for domain in DomainNetDataModule(folder).find()}
    clipart = found["clipart"]
    assert clipart.test is not None
    for samples, least, most in ((clipart.samples, 4, 9), (clipart.test, 1, 3)):
        for path, label in zip(samples.keys, samples.labels, strict=True):
            assert path.parent == folder / "clipart" / CLASSES[label]
            assert least <= int(path.stem[-6:]) <= most
    assert (len(clipart.samples), len(clipart.test)) == (60, 30)
    assert [len(found[name].samples) for name in DOMAINS] == [60, 70, 80, 60, 70, 80]


def test_both_lists_are_cut_to_the_smallest_domain(folder: Path) -> None:
    lines = (folder / "real_test.txt").read_text().splitlines(keepends=True)
    (folder / "real_test.txt").write_text("".join(line for line in lines if not line.endswith("2.jpg 5\n")))
    cut = DomainNetDataModule(folder, image_size=8, clients_per_domain=1)
    assert {(row["train"] + row["val"], row["test"]) for row in cut.describe()} == {(60, 29)}  # type: ignore[operator]
    whole = DomainNetDataModule(folder, image_size=8, clients_per_domain=1, equal_domains=False)
    assert [row["test"] for row in whole.describe()] == [30, 30, 30, 30, 29, 30]


def test_labels_follow_the_classes_that_were_asked_for(folder: Path) -> None:
    module = DomainNetDataModule(
        folder, image_size=8, classes=["zebra", "aircraft_carrier"], clients_per_domain=1, alpha=None
    )
    assert module.num_classes == 2
    assert np.bincount(labels_of(module.clients[0].train)).tolist() == [5, 5]
    by_class = {path.parent.name: label for path, label in _pairs(module)}
    assert by_class == {"zebra": 0, "aircraft_carrier": 1}


def _pairs(module: DomainNetDataModule) -> list[tuple[Path, int]]:
    return [
        pair
        for domain in module.find()
        for pair in zip(domain.samples.keys, domain.samples.labels.tolist(), strict=True)
    ]


def test_lists_may_lie_in_a_folder_of_their_own(folder: Path) -> None:
    (folder / "splits").mkdir()
    for path in folder.glob("*.txt"):
        path.rename(folder / "splits" / path.name)
    module = DomainNetDataModule(folder, image_size=8, clients_per_domain=1, unseen_clients_per_domain=1)
    module.prepare_data()
    assert len(module.pool("unseen")) == 6


@pytest.mark.parametrize("missing", ["sketch_train.txt", "sketch_test.txt", "sketch"])
def test_what_is_missing_is_named_with_where_to_get_it(folder: Path, missing: str) -> None:
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=rf"DomainNet is not there: .*{missing} is missing\. .*ai\.bu\.edu/M3SDA"):
        DomainNetDataModule(folder).prepare_data()


def test_a_listed_image_that_is_not_there_is_named(folder: Path) -> None:
    next(folder.glob("real/zebra/*_000001.jpg")).unlink()
    with pytest.raises(DataError, match=r"real/zebra/real_\d+_000001\.jpg cannot be read: there is no such file"):
        DomainNetDataModule(folder, image_size=8, clients_per_domain=1, domains=["real"]).setup()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("clipart/zebra 344\n", r"Line 1 of .*clipart_train\.txt is 'clipart/zebra 344'"),
        ("clipart/zebra/a.jpg 344\n", r"clipart_train\.txt lists no image of the class 'bird'"),
        ("", "lists no image of the class 'bird'"),
    ],
)
def test_a_broken_list_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "clipart_train.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        DomainNetDataModule(folder).setup()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"domains": ["photo"]}, "There is no domain 'photo'"),
        ({"classes": []}, "name at least one"),
        ({"classes": ["bird", "bird"]}, "each at most once"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DomainNetDataModule(**wrong)


def test_a_round_of_training(folder: Path, tmp_path: Path) -> None:
    arguments = {"root": str(folder), "image_size": 8, "clients_per_domain": 1}
    methods = run_one_round("fedl2p.datamodules.DomainNetDataModule", arguments, tmp_path / "run", in_channels=3)
    assert len(methods["fedl2p"]["seen"]["clients"]) == 6
