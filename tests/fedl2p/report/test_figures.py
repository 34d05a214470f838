"""The figures say what the numbers say, and survive numbers that are not there."""

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fedl2p.errors import RunFolderError
from fedl2p.federation.state import RoundRecord
from fedl2p.report.figures import accuracy_bars, hyperparameter_boxes, learning_curve, save_figures

PNG = b"\x89PNG\r\n\x1a\n"


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_learning_curve_shows_every_round_and_marks_the_best(history: list[RoundRecord]) -> None:
    axes = learning_curve(history).axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines["fixed cohort, validation"].get_ydata()) == [record.val_loss for record in history]
    best = min(history, key=lambda record: record.val_loss)
    assert f"best: {best.val_loss:.3f} in round {best.round}" in lines
    assert axes.get_xlabel() == "Round"
    assert "Loss" in axes.get_ylabel()


def test_learning_curve_takes_the_lines_of_the_metrics_file(history: list[RoundRecord]) -> None:
    records = [{**record.as_dict(), "val_loss": None if record.round == 5 else record.val_loss} for record in history]
    (line,) = [line for line in learning_curve(records).axes[0].lines if line.get_label() == "fixed cohort, validation"]
    assert math.isnan(list(line.get_ydata())[5])


def test_bars_are_the_mean_accuracies_in_percent(results: dict[str, Any]) -> None:
    figure = accuracy_bars(results)
    widths = sorted(patch.get_width() for patch in figure.axes[0].patches)
    means = [
        100 * method[pool]["accuracy"]["mean"]
        for method in results["methods"].values()
        for pool in ("seen", "unseen")
        if pool in method
    ]
    assert widths == pytest.approx(sorted(means))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [method["label"] for method in results["methods"].values()]


def test_bars_leave_out_what_is_not_a_number(results: dict[str, Any]) -> None:
    results["methods"]["l2p"]["seen"]["accuracy"]["mean"] = math.nan
    results["methods"]["global"]["seen"]["accuracy"]["sd"] = None
    figure = accuracy_bars(results)
    assert len(figure.axes[0].patches) == 12
    assert "L2P" not in [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_boxes_are_the_layers_in_order(rows: list[dict[str, Any]]) -> None:
    rows.append({**rows[0], "value": math.nan})
    axes = hyperparameter_boxes(rows, "beta").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "layer1.0.bn1",
        "layer1.0.bn2",
        "layer2.0.bn1",
        "layer2.0.downsample.1",
    ]
    assert axes.yaxis_inverted()
    assert axes.get_xlim() == (-0.02, 1.02)


@pytest.mark.parametrize(("large", "scale"), [(0.03, "linear"), (30.0, "symlog")])
def test_rates_of_very_different_size_get_a_logarithmic_axis(large: float, scale: str) -> None:
    values = (-0.01, 0.0, 0.01, 0.02, large)
    rows = [{"kind": "eta", "layer": "fc.weight", "value": value} for value in values]
    assert hyperparameter_boxes(rows, "eta").axes[0].get_xscale() == scale


def test_figures_without_values_say_so() -> None:
    for figure in (
        learning_curve([]),
        accuracy_bars({}),
        accuracy_bars({"methods": {"global": {}}}),
        hyperparameter_boxes([], "eta"),
    ):
        assert texts(figure) == ["Nothing to draw: no finite values."]


def test_files_are_whole_and_reproducible(
    tmp_path: Path, results: dict[str, Any], history: list[RoundRecord], rows: list[dict[str, Any]]
) -> None:
    first = save_figures(tmp_path / "a" / "figures", results=results, history=history, rows=rows)
    again = save_figures(tmp_path / "b", results=results, history=history, rows=rows)
    assert list(first) == ["accuracy", "learning_curve", "beta", "eta"]
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == sorted(f"{name}.png" for name in first)
    for name, path in first.items():
        assert path.read_bytes().startswith(PNG)
        assert path.read_bytes() == again[name].read_bytes()


def test_only_what_there_is_gets_drawn(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    eta = [row for row in rows if row["kind"] == "eta"]
    assert list(save_figures(tmp_path, results={}, rows=eta)) == ["eta"]


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path, results: dict[str, Any]) -> None:
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(RunFolderError, match="Cannot write"):
        save_figures(tmp_path / "figures", results=results)
