"""The headline table."""

import io
import math
from typing import Any

import pytest
from rich.console import Console

from fedl2p.report.table import cells, methods_table, plain_rows, pool_names

DASH = "–"  # noqa: RUF001


def test_rows_are_methods_and_columns_pools(results: dict[str, Any]) -> None:
    header, *rows = plain_rows(results)
    assert header == ["Method", "seen", "unseen"]
    assert [row[0] for row in rows] == [method["label"] for method in results["methods"].values()]
    accuracy = results["methods"]["ft_bn_g"]["unseen"]["accuracy"]
    assert rows[2][2] == f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f}"
    assert rows[4] == ["L2P", rows[4][1], DASH]


def test_the_best_of_each_pool_is_bold(results: dict[str, Any]) -> None:
    table = methods_table(results)
    for column in table.columns[1:]:
        styles = [cell.style for cell in column.cells]  # type: ignore[union-attr]
        assert [index for index, style in enumerate(styles) if style == "bold"] == [5]


def test_two_equal_methods_are_both_best() -> None:
    seen = {"accuracy": {"mean": 0.5, "sd": 0.1}}
    found = cells({"methods": {"a": {"seen": seen}, "b": {"seen": dict(seen)}, "c": {}}})
    assert found["a"]["seen"].best
    assert found["b"]["seen"].best
    assert found["c"] == {}


def test_nan_is_never_best_and_never_hides_the_best() -> None:
    def method(mean: float | None) -> dict[str, Any]:
        return {"seen": {"accuracy": {"mean": mean, "sd": 0.1}}}

    found = cells({"methods": {"a": method(math.nan), "b": method(0.4), "c": method(None)}})
    assert [found[name]["seen"].best for name in "abc"] == [False, True, False]
    assert found["a"]["seen"].text == DASH


def test_a_label_with_markup_is_printed_as_it_is(results: dict[str, Any]) -> None:
    results["methods"]["fedl2p"]["label"] = "[bold]mine[/bold]"
    out = io.StringIO()
    Console(file=out, width=120).print(methods_table(results))
    assert "[bold]mine[/bold]" in out.getvalue()
    assert "unseen (4 clients)" in out.getvalue()


@pytest.mark.parametrize("results", [{}, {"methods": {}}, {"methods": {"global": None}}])
def test_nothing_measured_gives_a_table_without_pools(results: dict[str, Any]) -> None:
    assert pool_names(results) == []
    assert [column.header for column in methods_table(results).columns] == ["Method"]


def test_pools_of_other_names_come_last() -> None:
    entry = {"accuracy": {"mean": 0.5}}
    methods = {"a": {"later": entry, "unseen": entry}, "b": {"seen": entry, "settings": {"rate": 1}}}
    assert pool_names({"methods": methods}) == ["seen", "unseen", "later"]
