"""`fedl2p data`: how a configuration divides its data among clients, before anything is trained on them."""

from pathlib import Path

import numpy as np
from rich.console import Console

from fedl2p.datamodules.base.arrays import labels_of
from fedl2p.datamodules.base.federated import FederatedDataModule
from fedl2p.errors import DataError, RunFolderError
from fedl2p.experiment.build import build_data
from fedl2p.experiment.schema import Config
from fedl2p.io import write_atomically
from fedl2p.pools import POOLS, ROLES
from fedl2p.report.drawing import png
from fedl2p.report.split import (
    ClientSplit,
    clients_table,
    domains_table,
    labels_table,
    pools_table,
    split_figure,
)

MAX_CLIENTS = 6  # of a pool, unless all are asked for


def inspect_data(config: Config, *, picture: str | None = None, all_clients: bool = False) -> Path:
    """Prints pools, domains, labels and clients, and writes the picture.

    Args:
        config: from `load_config`; only its data are looked at.
        picture: the PNG file; None is one beside where the run's folder would be.
        all_clients: list every client, not the first few of each pool.

    Returns:
        The picture's path.

    Raises:
        ConfigError: the data are wrong, or missing.
        RunFolderError: the picture exists already, or cannot be written.
    """
    output = Path(config.output_dir)
    path = Path(picture) if picture is not None else output.with_name(f"{output.name}-data.png")
    if path.exists():
        raise RunFolderError(f"The picture '{path}' exists already; name another by --picture.")
    data = build_data(config)
    clients, classes = read_split(data), class_names(data)
    console = Console()
    console.print(clients_table(clients, most=None if all_clients else MAX_CLIENTS))
    console.print(labels_table(clients, classes))
    console.print(domains_table(clients))
    console.print(pools_table(clients))
    name = config.data.class_path.rpartition(".")[2]
    figure = split_figure(clients, classes, title=f"{name}, seed {data.seed}: {len(clients)} clients")
    write_atomically(path, png(figure))
    console.print(f"{path}", soft_wrap=True, highlight=False)
    return path


def read_split(data: FederatedDataModule) -> list[ClientSplit]:
    """What each client has, by pool and id.

    Raises:
        DataError: a label is outside the classes.
    """
    result = []
    for client in data.clients:
        counts = np.zeros((len(ROLES), data.num_classes), dtype=np.int64)
        for row, role in enumerate(ROLES):
            labels = labels_of(getattr(client, role))
            if labels.min() < 0 or labels.max() >= data.num_classes:
                raise DataError(
                    f"Client {client.name!r} has the label {labels.max() if labels.min() >= 0 else labels.min()} in "
                    f"{role}; labels are 0 to {data.num_classes - 1}."
                )
            counts[row] = np.bincount(labels, minlength=data.num_classes)
        result.append(
            ClientSplit(
                name=client.name, pool=client.pool, domain=client.domain, counts=counts, details=dict(client.details)
            )
        )
    return sorted(result, key=lambda client: POOLS.index(client.pool))


def class_names(data: FederatedDataModule) -> list[str]:
    """The classes' names, or their numbers where the data module gives none."""
    return list(data.classes) or [str(label) for label in range(data.num_classes)]
