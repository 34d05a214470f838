"""What a report shows beside the results: who the clients are, and what the nets read of each of them."""

from collections.abc import Sequence
from typing import Any

from fedl2p.core.meta_nets import MetaNets
from fedl2p.core.statistics import ClientStatistics
from fedl2p.datamodules.base.federated import FederatedDataModule
from fedl2p.errors import DataError
from fedl2p.experiment.inspect_data import class_names, read_split
from fedl2p.pools import ROLES
from fedl2p.report.hyperparameters import Described


def client_record(data: FederatedDataModule) -> dict[str, Any]:
    """The content of `clients.json`: no sample, only counts.

    Args:
        data: the federation's data.

    Returns:
        `classes`, their names; `clients`, for each its `name`, `pool`, `domain`, `sizes` (samples by role), `labels`
        (samples by role and class) and `details`. Where labels cannot be counted, `labels` is missing.
    """
    try:
        splits = {split.name: split for split in read_split(data)}
    except (DataError, TypeError, ValueError):
        splits = {}  # labels that are no classes: the sizes are known all the same
    clients = []
    for client_id, client in enumerate(data.clients):
        sizes = dict(zip(ROLES, data.client_sizes(client_id), strict=True))
        entry: dict[str, Any] = {"name": client.name, "pool": client.pool, "domain": client.domain, "sizes": sizes}
        if client.name in splits:
            counts = splits[client.name].counts.tolist()
            entry["labels"] = dict(zip(sizes, counts, strict=True))
        clients.append({**entry, "details": {key: float(value) for key, value in client.details.items()}})
    return {"classes": class_names(data), "clients": clients}


def net_input_rows(
    clients: Sequence[Described], statistics: Sequence[ClientStatistics], meta_nets: MetaNets
) -> list[dict[str, Any]]:
    """What BNNet and LRNet read, in the long form of `hyperparameter_rows`.

    Args:
        clients: who they are.
        statistics: one a client, in the same order.
        meta_nets: has the names of the B batch norms and of the M layers.

    Returns:
        Rows of the kinds `xi` (a batch norm's divergence), `mean` and `sd` (of a layer's inputs).
    """
    rows: list[dict[str, Any]] = []
    for client, own in zip(clients, statistics, strict=True):
        moments = own.layer_moments.reshape(-1, 2)
        who = {"client": client.name, "domain": client.domain, "pool": client.pool}
        for kind, names, values in (
            ("xi", meta_nets.batchnorm_names, own.bn_divergence),
            ("mean", meta_nets.layer_names, moments[:, 0]),
            ("sd", meta_nets.layer_names, moments[:, 1]),
        ):
            numbers = values.detach().cpu().tolist()
            rows += [
                {**who, "kind": kind, "layer": name, "value": value} for name, value in zip(names, numbers, strict=True)
            ]
    return rows
