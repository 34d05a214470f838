"""Tables and picture of how data are divided, from three clients whose numbers are known."""

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from fedl2p.report.split import (
    ClientSplit,
    clients_table,
    domains_table,
    label_skew,
    labels_table,
    pools_table,
    split_figure,
)

ANN = ClientSplit(name="ann", pool="seen", domain="dark", counts=np.array([[4, 0], [2, 0], [2, 0]]))
BEN = ClientSplit(name="ben", pool="seen", domain="light", counts=np.array([[0, 8], [0, 4], [0, 4]]))
COUNTS = np.array([[3, 1], [1, 1], [1, 1]])
CAT = ClientSplit(name="cat", pool="unseen", domain="dark", counts=COUNTS, details={"size": 4, "tilt": 0.5})
CLIENTS = [ANN, BEN, CAT]


def lines(table: Table) -> list[list[str]]:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return [line.split() for line in capture.get().splitlines() if line.strip(" ─")]


def test_label_skew_by_hand() -> None:
    """Together 8 and 16 samples: (1/3, 2/3); Ann is 2/3 away, Ben 1/3."""
    assert label_skew([ANN, BEN]) == pytest.approx(0.5)
    assert label_skew([CAT]) == 0.0


def test_the_pools() -> None:
    assert lines(pools_table(CLIENTS))[2:] == [
        ["seen", "2", "2", "12", "6", "6", "4", "to", "8", "(6)", "0.50"],
        ["unseen", "1", "1", "4", "2", "2", "4", "0.00"],
    ]


def test_the_domains() -> None:
    assert lines(domains_table(CLIENTS))[2:] == [
        ["dark", "1", "1", "16", "██████████"],
        ["light", "1", "0", "16", "██████████"],
    ]


def test_the_labels() -> None:
    assert lines(labels_table(CLIENTS, ["no", "yes"]))[2:] == [
        ["no", "8", "5", "█████", "██████████"],
        ["yes", "16", "3", "██████████", "██████"],
    ]


def test_the_clients() -> None:
    shown = lines(clients_table(CLIENTS))
    assert shown[1] == ["Client", "train", "val", "test", "tilt", "labels"]
    assert shown[2:] == [
        ["ann", "4", "2", "2", "█"],
        ["ben", "8", "4", "4", "█"],
        ["cat", "4", "2", "2", "0.5", "█▅"],
    ]


def test_clients_that_are_left_out_are_counted() -> None:
    shown = lines(clients_table(CLIENTS, most=1))
    assert [row[0] for row in shown[2:4]] == ["ann", "cat"]
    assert " ".join(shown[-1]) == "and 1 more seen clients; --all shows them"


def test_tables_of_many_classes_fit_a_terminal() -> None:
    many = ClientSplit(name="m", pool="seen", domain="all", counts=np.ones((3, 500), dtype=np.int64))
    assert len(lines(clients_table([many]))[2][-1]) <= 64


def test_the_picture_has_every_client_once_by_pool_domain_and_size() -> None:
    figure = split_figure([CAT, BEN, ANN], ["no", "yes"], title="Three clients")
    sizes, labels, strip, *_ = figure.axes
    assert sizes.get_title(loc="left") == "Three clients"
    heights = np.array([bar.get_height() for bar in sizes.patches]).reshape(3, 3)
    assert heights.tolist() == [[4, 8, 4], [2, 4, 2], [2, 4, 2]]  # by role; Cat is of the first domain given
    np.testing.assert_allclose(labels.images[0].get_array(), [[5 / 8, 0, 1], [3 / 8, 1, 0]])
    assert [text.get_text() for text in strip.texts] == ["unseen (1)", "seen (2)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dark", "light"]
