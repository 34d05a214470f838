"""Who takes part: each node says which client it holds, and each client describes its data."""

from dataclasses import dataclass

import torch
from flwr.serverapp import Grid
from torch import Tensor

from fedl2p.core.meta_nets import MetaNets
from fedl2p.errors import FederationError
from fedl2p.federation.messages import DESCRIBE, IDENTIFY, instruction
from fedl2p.federation.replies import Refusal, answers, read_description, read_identity


@dataclass(frozen=True, eq=False)
class Participant:
    """A seen client that takes part in the rounds.

    Attributes:
        node_id: Flower's id of the node that holds it.
        client_id: its number in the data.
        name: its name in the data.
        num_samples: N_i, its training samples.
        bn_divergence: xi of Eq. 3.
        layer_moments: the mean and standard deviation of every learnable layer's input.
    """

    node_id: int
    client_id: int
    name: str
    num_samples: int
    bn_divergence: Tensor
    layer_moments: Tensor


def find_nodes(grid: Grid) -> dict[int, int]:
    """Asks every node which client it holds.

    Args:
        grid: whose apps answer `query.identify`.

    Returns:
        Node ids by client id, in the order of client ids.

    Raises:
        FederationError: a node does not answer as it should.
    """
    node_ids = list(grid.get_node_ids())
    replies = grid.send_and_receive([instruction(IDENTIFY, node_id, config={}) for node_id in node_ids])
    found: dict[int, int] = {}
    for node_id, client_id in answers(node_ids, replies, read_identity):
        if isinstance(client_id, Refusal):
            raise FederationError(f"A node could not say which client it holds: {client_id.reason}")
        found[client_id] = node_id
    return dict(sorted(found.items()))


def find_participants(grid: Grid, names: dict[int, str]) -> tuple[Participant, ...]:
    """Asks the clients that are to take part who they are.

    Args:
        grid: whose apps answer `query.identify` and `query.describe`.
        names: of those clients, by client id; nodes of others are not asked.

    Returns:
        In the order of client ids.

    Raises:
        FederationError: a client has no node, or does not answer as it should.
    """
    nodes = find_nodes(grid)
    missing = [name for client_id, name in names.items() if client_id not in nodes]
    if missing:
        raise FederationError(f"{len(missing)} seen clients have no node, among them '{missing[0]}'.")
    clients = {nodes[client_id]: client_id for client_id in sorted(names)}
    replies = grid.send_and_receive([instruction(DESCRIBE, node_id, config={"server-round": 0}) for node_id in clients])
    found = []
    for node_id, answer in answers(clients, replies, read_description):
        if isinstance(answer, Refusal):
            raise FederationError(f"A client could not describe its data: {answer.reason}")
        client_id = clients[node_id]
        found.append(
            Participant(
                node_id=node_id,
                client_id=client_id,
                name=names[client_id],
                num_samples=answer.num_samples,
                bn_divergence=answer.bn_divergence,
                layer_moments=answer.layer_moments,
            )
        )
    return tuple(found)


def standardize_inputs(meta_nets: MetaNets, participants: tuple[Participant, ...]) -> None:
    """Sets the nets' input shift and scale to those of the participants' statistics, see `MetaNets.standardize`."""
    moments = torch.stack([p.layer_moments for p in participants])
    meta_nets.standardize(
        torch.stack([p.bn_divergence for p in participants]),
        moments,
        moments.new_tensor([float(p.num_samples) for p in participants]),
    )
