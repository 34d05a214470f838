"""Table 6 and the distance maps, from clients whose domains are known to be far apart or not."""

import math
from typing import Any

import numpy as np
import pytest

from fedl2p.report.domains import agreements, distance_maps, mean_off_diagonal
from fedl2p.report.saved_run import SavedRun


def table(kinds: tuple[str, ...], shift: float, *, clients: int = 24) -> list[dict[str, Any]]:
    """Two domains whose values are `shift` apart, in units of the clients' own scatter."""
    random, made = np.random.default_rng(0), []
    for place in range(clients):
        who = {"client": f"c{place}", "domain": "xy"[place % 2], "pool": "seen" if place < clients // 2 else "unseen"}
        for kind in kinds:
            for layer in range(4):
                value = float(random.normal(shift * (place % 2)))
                made.append({**who, "kind": kind, "layer": f"l{layer}", "value": value})
    return made


def test_domains_far_apart_are_found_and_others_are_not() -> None:
    """The inputs tell the domains apart, the outputs have nothing to do with them."""
    run = SavedRun(recipes=table(("beta", "eta"), 0.0), net_inputs=table(("xi", "mean", "sd"), 20.0))
    found = {(entry.pool, entry.feature.symbol): entry for entry in agreements(run)}
    assert {pool for pool, _ in found} == {"all", "seen", "unseen"}
    for pool, clients in (("all", 24), ("seen", 12), ("unseen", 12)):
        assert found[pool, "ξ"].index == found[pool, "x"].index == pytest.approx(1.0)
        assert found[pool, "β"].index < 0.5 and found[pool, "η"].index < 0.5
        assert found[pool, "ξ"].clients == clients


def test_the_maps_say_how_far() -> None:
    run = SavedRun(recipes=table(("beta", "eta"), 0.0), net_inputs=table(("xi", "mean", "sd"), 20.0))
    maps = {feature.symbol: mean_off_diagonal(values) for feature, _, values in distance_maps(run)}
    assert set(maps) == {"ξ", "β", "x", "η"}
    assert maps["ξ"] > 2 and maps["x"] > 2
    assert abs(maps["β"]) < 0.3 and abs(maps["η"]) < 0.3


def test_one_client_a_domain_has_no_answer() -> None:
    run = SavedRun(recipes=table(("beta", "eta"), 1.0, clients=2))
    assert all(math.isnan(entry.index) for entry in agreements(run))
    assert list(distance_maps(run)) == []


def test_without_inputs_the_outputs_are_compared_all_the_same() -> None:
    run = SavedRun(recipes=table(("beta", "eta"), 20.0))
    assert {entry.feature.symbol for entry in agreements(run)} == {"β", "η"}
