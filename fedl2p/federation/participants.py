"""Who takes part: each node says which client it holds, and each client describes its data."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from flwr.serverapp import Grid
from torch import Tensor

from fedl2p.core.functional import Tensors
from fedl2p.core.meta_nets import MetaNets
from fedl2p.errors import FederationError
from fedl2p.federation.messages import DESCRIBE, IDENTIFY, instruction
from fedl2p.federation.replies import Refusal, answers, read_description, read_identity

MAX_STATISTICS_RATIO = 50.0  # how much larger than the median client's a client's statistics can honestly be
MAX_SAMPLES_RATIO = 1000.0  # likewise, its number of samples
MIN_CLIENTS = 3  # clients of whom a median says something


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


def find_nodes(grid: Grid, client_ids: Collection[int]) -> tuple[dict[int, int], dict[int, str]]:
    """Asks every node which client it holds.

    Args:
        grid: whose apps answer `query.identify`.
        client_ids: who is looked for; other clients' nodes are left alone.

    Returns:
        Node ids by client id, in the order of client ids; and by client id, why there is none. A client that two nodes
        claim has none, since either may lie.
    """
    node_ids = list(grid.get_node_ids())
    replies = grid.send_and_receive([instruction(IDENTIFY, node_id, config={}) for node_id in node_ids])
    claims: dict[int, list[int]] = {client_id: [] for client_id in sorted(client_ids)}
    refused = ""
    for node_id, client_id in answers(node_ids, replies, read_identity):
        if isinstance(client_id, Refusal):
            refused = refused or f"; a node could not say which client it holds: {client_id.reason}"
        elif client_id in claims:
            claims[client_id].append(node_id)
    found = {client_id: nodes[0] for client_id, nodes in claims.items() if len(nodes) == 1}
    reasons = {
        client_id: f"{len(nodes)} nodes say that they hold it" if nodes else f"no node says that it holds it{refused}"
        for client_id, nodes in claims.items()
        if len(nodes) != 1
    }
    return found, reasons


def find_participants(
    grid: Grid, names: dict[int, str], template: Tensors, *, min_reply_fraction: float = 0.5
) -> tuple[tuple[Participant, ...], dict[str, str]]:
    """Asks the clients that are to take part who they are.

    Args:
        grid: whose apps answer `query.identify` and `query.describe`.
        names: of those clients, by client id; nodes of others are not asked.
        template: `bn_divergence` and `layer_moments` in the shapes and types that the nets read.
        min_reply_fraction: the share of those clients that must be able to take part.

    Returns:
        The participants in the order of client ids; and by name, why the others cannot take part.

    Raises:
        FederationError: too few can.
    """
    nodes, reasons = find_nodes(grid, names)
    failures = {names[client_id]: reason for client_id, reason in reasons.items()}
    clients = {node_id: client_id for client_id, node_id in nodes.items()}
    replies = grid.send_and_receive([instruction(DESCRIBE, node_id, config={"server-round": 0}) for node_id in clients])
    found = []
    for node_id, answer in answers(clients, replies, partial(read_description, template=template)):
        client_id = clients[node_id]
        if isinstance(answer, Refusal):
            failures[names[client_id]] = answer.reason
        elif answer.client_id != client_id:
            failures[names[client_id]] = f"its node says that it holds client {client_id}, then {answer.client_id}"
        else:
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
    failures |= _odd_descriptions(found)
    participants = tuple(p for p in found if p.name not in failures)
    needed = max(1, math.ceil(min_reply_fraction * len(names)))
    if len(participants) < needed:
        name, reason = next(iter(failures.items()))
        raise FederationError(
            f"{len(failures)} seen clients cannot take part, {needed} of {len(names)} must "
            f"(federation.min_reply_fraction {min_reply_fraction}); '{name}': {reason}."
        )
    return participants, failures


def _odd_descriptions(participants: Sequence[Participant]) -> dict[str, str]:
    """By name, whose description cannot be honest: it would push everybody else's standardized inputs to one point."""
    odd: dict[str, str] = {}
    if len(participants) < MIN_CLIENTS:
        return odd
    for what, size, most in (
        ("number of samples is", _num_samples, MAX_SAMPLES_RATIO),
        ("statistics are", _divergence_size, MAX_STATISTICS_RATIO),
        ("statistics are", _moments_size, MAX_STATISTICS_RATIO),
    ):
        sizes = [size(participant) for participant in participants]
        typical = max(1.0, float(np.median(sizes)))
        for participant, own in zip(participants, sizes, strict=True):
            if own / typical > most:
                odd[participant.name] = f"its {what} {own / typical:.3g} times as large as the median client's"
    return odd


def _num_samples(participant: Participant) -> float:
    return float(participant.num_samples)


def _moments_size(participant: Participant) -> float:
    return float(participant.layer_moments.double().norm())


def _divergence_size(participant: Participant) -> float:
    # xi grows with the square of a shift.
    return float(participant.bn_divergence.double().abs().log1p().norm())


def standardize_inputs(meta_nets: MetaNets, participants: tuple[Participant, ...]) -> None:
    """Sets the nets' input shift and scale to those of the participants' statistics, see `MetaNets.standardize`."""
    moments = torch.stack([p.layer_moments for p in participants])
    meta_nets.standardize(
        torch.stack([p.bn_divergence for p in participants]),
        moments,
        moments.new_tensor([float(p.num_samples) for p in participants]),
    )
