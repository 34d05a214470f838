"""Gains over the best baseline, by hand."""

import math
from typing import Any

import pytest

from fedl2p.report.gains import baselines, best_baseline, client_gains, gains_by_domain, summarize


def method(**accuracies: float | None) -> dict[str, Any]:
    finite = [value for value in accuracies.values() if value is not None]
    clients = {name: {"accuracy": value, "loss": 0.1, "count": 8} for name, value in accuracies.items()}
    return {"seen": {"accuracy": {"mean": sum(finite) / len(finite)}, "clients": clients}}


RESULTS: dict[str, Any] = {
    "methods": {
        "global": method(ann=0.5, ben=0.9, cat=0.2),
        "ft_bn_c": method(ann=0.7, ben=0.6, cat=0.3),
        "fedl2p": method(ann=0.8, ben=0.6, cat=0.3),
        "fedl2p_shuffled": method(ann=1.0, ben=1.0, cat=1.0),
        "mean_recipe": method(ann=1.0, ben=1.0, cat=1.0),
        "oracle": method(ann=1.0, ben=1.0, cat=1.0),
    }
}
WHO = {"ann": ("seen", "light"), "ben": ("seen", "dark"), "cat": ("seen", "dark")}


def test_controls_are_no_baselines() -> None:
    assert baselines(RESULTS) == ["global", "ft_bn_c"]
    assert best_baseline(RESULTS, "seen") == "global"
    assert best_baseline(RESULTS, "unseen") is None


def test_every_client_has_its_own_best_baseline() -> None:
    gains = client_gains(RESULTS, "seen")
    assert [(gain.client, gain.baseline) for gain in gains] == [
        ("ben", "global"),
        ("cat", "ft_bn_c"),
        ("ann", "ft_bn_c"),
    ]
    assert [gain.points for gain in gains] == pytest.approx([-30.0, 0.0, 10.0])


def test_the_summary_counts_and_averages() -> None:
    summary = summarize(client_gains(RESULTS, "seen"))
    assert (summary.count, summary.better, summary.equal, summary.worse) == (3, 1, 1, 1)
    assert summary.mean == pytest.approx(-20 / 3)


def test_by_domain() -> None:
    groups = gains_by_domain(RESULTS, WHO)
    assert list(groups) == [("seen", "dark"), ("seen", "light")]
    assert groups[("seen", "dark")].mean == pytest.approx(-15.0)
    assert groups[("seen", "light")].better == 1


def test_clients_without_a_number_are_left_out() -> None:
    results = {"methods": {"global": method(ann=0.5, ben=None), "fedl2p": method(ann=math.nan, ben=0.5, cat=0.1)}}
    assert client_gains(results, "seen") == []
    assert client_gains({}, "seen") == []
