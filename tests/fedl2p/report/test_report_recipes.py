"""Layers, limits and sparsity, by hand."""

import math
from typing import Any

import numpy as np
import pytest

from fedl2p.report.recipes import at_limits, by_domain, layer_spreads, matrix, model_sparsity


def rows(kind: str, layer: str, *values: float | None) -> list[dict[str, Any]]:
    return [
        {"client": f"c{i}", "domain": "ab"[i % 2], "pool": "seen", "kind": kind, "layer": layer, "value": value}
        for i, value in enumerate(values)
    ]


def test_layers_keep_the_order_of_the_model_and_lose_what_is_no_number() -> None:
    spreads = layer_spreads(
        rows("beta", "z", 0.1, math.nan, 0.5) + rows("beta", "a", None, 1.0) + rows("eta", "z", 2.0), "beta"
    )
    assert [(spread.layer, spread.clients) for spread in spreads] == [("z", ("c0", "c2")), ("a", ("c1",))]
    assert spreads[0].quartiles == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5))


def test_a_layer_is_at_a_limit_where_half_of_the_clients_are() -> None:
    found = at_limits(
        rows("beta", "low", 0.0, 0.0, 0.5, 0.6)
        + rows("beta", "high", 1.0, 1.0, 1.0, 0.6)
        + rows("beta", "inside", 0.0, 1.0, 0.5, 0.6)
        + rows("eta", "frozen", 0.0, 0.0, 0.0, 0.0)
        + rows("eta", "one", 1.0, 1.0, 1.0, 1.0)
    )
    assert found == [("beta", "low", 0.0, 0.5), ("beta", "high", 1.0, 0.75), ("eta", "frozen", 0.0, 1.0)]


def test_the_sparsity_weights_tensors_by_their_values() -> None:
    table = rows("eta", "w", 0.0, 0.0, 0.1, 0.1) + rows("eta", "b", 0.1, 0.1, 0.1, 0.1)
    assert model_sparsity(table) == pytest.approx(0.25)
    assert model_sparsity(table, {"w": 9, "b": 1}) == pytest.approx(0.45)
    assert model_sparsity(table, {"w": 9}) == pytest.approx(0.25)  # a size is missing
    assert math.isnan(model_sparsity(rows("beta", "w", 0.0)))


def test_domains_are_apart_and_sorted() -> None:
    assert {name: len(own) for name, own in by_domain(rows("beta", "w", 1, 2, 3)).items()} == {"a": 2, "b": 1}


def test_the_matrix_has_whole_clients_only() -> None:
    table = rows("mean", "w", 1.0, 2.0, 3.0) + rows("sd", "w", 4.0, math.nan, 6.0) + rows("xi", "w", 9.0, 9.0, 9.0)
    names, values = matrix(table, ("mean", "sd"))
    assert names == ["c0", "c2"]
    assert np.array_equal(values, [[1.0, 4.0], [3.0, 6.0]])
    assert matrix([], ("xi",))[1].shape == (0, 0)
