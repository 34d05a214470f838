"""What a run writes down for its report."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedl2p.core.batchnorm import convert_batchnorm
from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.statistics import collect_statistics
from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.experiment.record import client_record, net_input_rows
from fedl2p.io import write_json
from fedl2p.report.saved_run import read_run


class TwoClients(FederatedDataModule):
    num_classes = 3
    classes = ("no", "maybe", "yes")

    def __init__(self, label: int = 2) -> None:
        super().__init__()
        self.label = label

    def build_clients(self) -> Iterator[ClientData]:
        for place, pool in enumerate(("seen", "unseen")):
            y = torch.tensor([0, self.label, self.label, place])
            data: Dataset[tuple[Tensor, Tensor]] = TensorDataset(torch.randn(4, 2), y)
            yield ClientData(name=f"c{place}", pool=pool, domain="d", train=data, val=data, test=data, details={"t": 1})


def test_every_client_is_described_by_counts_alone() -> None:
    record = client_record(TwoClients())
    assert record["classes"] == ["no", "maybe", "yes"]
    assert record["clients"][1] == {
        "name": "c1",
        "pool": "unseen",
        "domain": "d",
        "sizes": {"train": 4, "val": 4, "test": 4},
        "labels": {"train": [1, 1, 2], "val": [1, 1, 2], "test": [1, 1, 2]},
        "details": {"t": 1.0},
    }


def test_labels_that_cannot_be_counted_are_left_out() -> None:
    record = client_record(TwoClients(label=7))
    assert [sorted(client) for client in record["clients"]] == [["details", "domain", "name", "pool", "sizes"]] * 2


def test_reports_read_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    write_json(tmp_path / "clients.json", client_record(TwoClients()))
    clients = read_run(tmp_path).clients
    assert [client.name for client in clients] == ["c0", "c1"]
    assert clients[1].counts.tolist() == [[1, 1, 2]] * 3


def test_the_inputs_of_the_nets_are_rows_by_layer() -> None:
    model = convert_batchnorm(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    data = TwoClients()
    statistics = [collect_statistics(model, data.client(i).statistics_dataloader()) for i in (0, 1)]
    rows = net_input_rows(data.clients, statistics, MetaNets(model))
    assert len(rows) == 2 * (1 + 3 + 3)
    assert [(row["kind"], row["layer"]) for row in rows[:7]] == [
        ("xi", "1"),
        *(("mean", layer) for layer in "012"),
        *(("sd", layer) for layer in "012"),
    ]
    own = [row for row in rows if row["client"] == "c1"]
    assert own[0]["value"] == pytest.approx(float(statistics[1].bn_divergence[0]))
    assert own[2]["value"] == pytest.approx(float(statistics[1].layer_moments[2]))
    assert own[5]["value"] == pytest.approx(float(statistics[1].layer_moments[3]))
