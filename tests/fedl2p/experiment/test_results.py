"""What `results.json` says of a method."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from fedl2p.core.learner import Evaluation
from fedl2p.datamodules.base.federated import ClientData, FederatedDataModule
from fedl2p.experiment.results import PACKAGES, MethodResult, client_table, compare, mean_of, versions


class Two(FederatedDataModule):
    num_classes = 3

    def build_clients(self) -> Iterable[ClientData]:
        data = TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
        for name in ("a", "b"):
            yield ClientData(name=name, pool="seen", train=data, val=data, test=data)


def table(*accuracies: float) -> dict[str, dict[str, float]]:
    return {f"c{i}": {"accuracy": a, "loss": 2 * a, "count": 4} for i, a in enumerate(accuracies)}


def test_a_client_s_row_has_accuracy_loss_and_count() -> None:
    outputs = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]])
    measured = [
        {"test": Evaluation(outputs, torch.tensor([0, 1, 2, 1]), 0.5, 7.0)},
        {"test": Evaluation(outputs[:2], torch.tensor([2, 2]), 3.0, 7.0)},
    ]
    assert client_table(Two(), [1, 0], measured) == {
        "b": {"accuracy": 0.75, "loss": 0.5, "count": 4},
        "a": {"accuracy": 0.0, "loss": 3.0, "count": 2},
    }


def test_a_method_has_mean_spread_and_every_client_by_pool() -> None:
    method = MethodResult("FedL2P", {"rate": 0.1}, {"seen": table(0.25, 0.75), "unseen": table(1.0)}).as_dict()
    assert (method["label"], method["settings"]) == ("FedL2P", {"rate": 0.1})
    assert method["seen"]["accuracy"]["mean"] == 0.5
    assert method["seen"]["loss"]["mean"] == 1.0
    assert method["seen"]["clients"] == table(0.25, 0.75)
    assert method["unseen"]["accuracy"]["mean"] == 1.0


def test_comparisons_pair_clients_on_the_pools_that_both_have() -> None:
    methods: dict[str, Any] = {
        "global": MethodResult("g", {}, {"seen": table(0.1, 0.2), "unseen": table(0.5, 0.7)}),
        "l2p": MethodResult("l", {}, {"seen": table(0.2, 0.2)}),
        "fedl2p": MethodResult("f", {}, {"seen": table(0.3, 0.6), "unseen": table(0.5, 0.7)}),
    }
    rows = {(row["b"], row["pool"]): row for row in compare(methods, seed=1)}
    assert set(rows) == {("global", "seen"), ("global", "unseen"), ("l2p", "seen")}
    assert rows["global", "seen"]["mean"] == pytest.approx(0.3)
    assert rows["l2p", "seen"]["mean"] == pytest.approx(0.25)
    assert rows["global", "unseen"]["mean"] == 0
    for row in rows.values():
        assert row["low"] <= row["mean"] <= row["high"]
    assert compare(methods, seed=1) == compare(methods, seed=1)


def test_versions_name_everything_that_numbers_depend_on() -> None:
    found = versions()
    assert set(found) == {"python", "machine", *PACKAGES}
    assert torch.__version__.startswith(found["torch"])


def test_the_mean_of_results_is_by_client() -> None:
    def result(accuracy: float, loss: float) -> MethodResult:
        table = {"a": {"accuracy": accuracy, "loss": loss, "count": 4}, "b": {"accuracy": 1.0, "loss": 0.0, "count": 2}}
        return MethodResult("M", {}, {"seen": table})

    mean = mean_of([result(0.5, 1.0), result(0.25, 3.0)], settings={"times": 2})
    assert mean.label == "M" and mean.settings == {"times": 2}
    assert mean.pools == {
        "seen": {
            "a": {"accuracy": 0.375, "loss": 2.0, "count": 4},
            "b": {"accuracy": 1.0, "loss": 0.0, "count": 2},
        }
    }


def test_the_refined_recipe_is_compared_with_what_it_must_beat_and_losses_have_intervals() -> None:
    names = ("global", "ft_bn_i", "ft_bn_g", "fedl2p_running", "mean_recipe", "fedl2p", "fedl2p_refined", "oracle")
    methods = {name: MethodResult(name, {}, {"seen": table(0.1 * i, 0.5)}) for i, name in enumerate(names)}
    pairs = [(row["a"], row["b"]) for row in compare(methods, seed=1, best="ft_bn_i")]
    assert pairs == [
        *(("fedl2p", other) for other in ("global", "ft_bn_i", "ft_bn_g", "mean_recipe", "fedl2p_refined")),
        *(("fedl2p_refined", other) for other in ("mean_recipe", "fedl2p", "ft_bn_i")),
    ]
    unknown = [row["b"] for row in compare(methods, seed=1) if row["a"] == "fedl2p_refined"]
    assert unknown == ["mean_recipe", "fedl2p", "ft_bn_i", "ft_bn_g"]
    row = compare(methods, seed=1, best="ft_bn_i")[-1]
    assert row["mean"] == pytest.approx((0.6 - 0.1) / 2)
    assert row["loss"]["mean"] == pytest.approx(2 * row["mean"])
    assert row["loss"]["low"] <= row["loss"]["mean"] <= row["loss"]["high"]


def test_a_loss_that_is_not_finite_has_no_interval() -> None:
    methods = {name: MethodResult(name, {}, {"seen": table(0.1, 0.5)}) for name in ("global", "fedl2p")}
    methods["global"].pools["seen"]["c0"]["loss"] = float("inf")
    (row,) = compare(methods, seed=1)
    assert row["loss"] is None and row["mean"] == 0
