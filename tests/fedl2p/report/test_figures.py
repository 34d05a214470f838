"""The figures say what the numbers say, and survive numbers that are not there."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedl2p.errors import RunFolderError
from fedl2p.federation.state import RoundRecord
from fedl2p.report.domains import FEATURES
from fedl2p.report.drawing import Drawing, inline, jitter, save_drawings, svg
from fedl2p.report.figures.accuracy import accuracy_bars, gain_figure
from fedl2p.report.figures.domains import distance_map
from fedl2p.report.figures.recipes import hyperparameter_boxes
from fedl2p.report.figures.split import split_panel
from fedl2p.report.figures.training import learning_curve, learning_curves, loss_limit
from fedl2p.report.gains import client_gains
from fedl2p.report.split import ClientSplit


def texts(drawing: Drawing) -> list[str]:
    return [text.get_text() for text in drawing.figure.axes[0].texts]


def test_learning_curve_shows_every_round_and_marks_the_best(history: list[RoundRecord]) -> None:
    axes = learning_curve(history).figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines["fixed cohort, validation"].get_ydata()) == [record.val_loss for record in history]
    best = min(history, key=lambda record: record.val_loss)
    assert f"best: {best.val_loss:.3f} in round {best.round}" in lines
    assert axes.get_xlabel() == "Round"
    assert "Loss" in axes.get_ylabel()


def test_learning_curve_takes_the_lines_of_the_metrics_file(history: list[RoundRecord]) -> None:
    records = [{**record.as_dict(), "val_loss": None if record.round == 5 else record.val_loss} for record in history]
    (line,) = [
        line for line in learning_curve(records).figure.axes[0].lines if line.get_label() == "fixed cohort, validation"
    ]
    assert math.isnan(list(line.get_ydata())[5])


def test_bars_are_the_mean_accuracies_in_percent(results: dict[str, Any]) -> None:
    figure = accuracy_bars(results).figure
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
    figure = accuracy_bars(results).figure
    assert len(figure.axes[0].patches) == 12
    assert "L2P" not in [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_boxes_are_the_layers_in_order(rows: list[dict[str, Any]]) -> None:
    rows.append({**rows[0], "value": math.nan})
    axes = hyperparameter_boxes(rows, "beta").figure.axes[0]
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
    assert hyperparameter_boxes(rows, "eta").figure.axes[0].get_xscale() == scale


def test_figures_without_values_say_so() -> None:
    for figure in (
        learning_curve([]),
        accuracy_bars({}),
        accuracy_bars({"methods": {"global": {}}}),
        hyperparameter_boxes([], "eta"),
    ):
        assert texts(figure) == ["Nothing to draw: no finite values."]


def drawings(results: dict[str, Any], history: list[RoundRecord], rows: list[dict[str, Any]]) -> list[Drawing]:
    return [
        accuracy_bars(results),
        learning_curve(history),
        hyperparameter_boxes(rows, "beta"),
        hyperparameter_boxes(rows, "eta"),
    ]


def test_files_are_whole_and_reproducible(
    tmp_path: Path, results: dict[str, Any], history: list[RoundRecord], rows: list[dict[str, Any]]
) -> None:
    first = save_drawings(tmp_path / "a" / "figures", drawings(results, history, rows))
    save_drawings(tmp_path / "b", drawings(results, history, rows))
    assert list(first) == ["accuracy", "learning-curve", "beta", "eta"]
    made = sorted((tmp_path / "a" / "figures").iterdir())
    assert [path.name for path in made] == sorted(f"{name}.{kind}" for name in first for kind in ("svg", "pdf"))
    for path in made:
        assert path.read_bytes().startswith(b"%PDF-" if path.suffix == ".pdf" else b"<?xml")
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path, results: dict[str, Any]) -> None:
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(RunFolderError, match="Cannot write"):
        save_drawings(tmp_path / "figures", [accuracy_bars(results)])


# The axis of losses


def records(losses: list[float | None]) -> list[dict[str, Any]]:
    return [{"round": place, "val_loss": loss} for place, loss in enumerate(losses)]


def test_a_spike_does_not_rule_the_axis_and_is_named() -> None:
    losses: list[float | None] = [1 - 0.02 * place for place in range(30)]
    losses[17] = 1644.0
    drawing = learning_curve(records(losses))
    assert drawing.figure.axes[0].get_ylim()[1] < 2.5
    assert "1 losses above the axis, up to 1,644" in drawing.caption
    (triangles,) = [line for line in drawing.figure.axes[0].lines if line.get_marker() == "^"]
    assert list(triangles.get_xdata()) == [17]


def test_without_a_spike_all_losses_are_inside() -> None:
    losses: list[float | None] = [1 - 0.02 * place for place in range(30)]
    drawing = learning_curve(records(losses))
    assert drawing.figure.axes[0].get_ylim()[1] > 1.0
    assert "Triangles" not in drawing.caption


def test_the_limit_by_hand() -> None:
    """Quantiles of 0..10 at 0.1 and 0.9 are 1 and 9, so the axis may reach 9 + 1.5 * 8 = 21."""
    steps = np.arange(11.0)
    assert loss_limit(steps) == 10.0
    assert loss_limit(np.array([*steps[:-1], 100.0])) == 21.0
    assert loss_limit(np.array([1.0, 100.0])) == 100.0
    assert math.isnan(loss_limit(np.array([math.nan])))


def test_a_run_of_high_losses_does_not_fall_off_the_axis_of_many_runs() -> None:
    high, low = records([5.0, 4.9, 4.8]), records([0.5] * 60)
    drawing = learning_curves({"high": high, "low": low})
    assert drawing.figure.axes[0].get_ylim()[1] >= 5.0
    assert drawing.alt == "high: best 4.800 in round 2; low: best 0.500 in round 0."


# Alternative texts, and marks that know their clients


def test_alternative_texts_carry_the_numbers(
    results: dict[str, Any], history: list[RoundRecord], rows: list[dict[str, Any]]
) -> None:
    bars, curve, beta, _ = drawings(results, history, rows)
    accuracy = results["methods"]["fedl2p"]["seen"]["accuracy"]
    assert f"FedL2P: seen {100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f}" in bars.alt
    best = min(history, key=lambda record: record.val_loss)
    assert f"best {best.val_loss:.3f} in round {best.round}" in curve.alt
    own = [row["value"] for row in rows if row["layer"] == "layer2.0.bn1"]
    assert f"layer2.0.bn1 median {np.median(own):.3g} ({min(own):.3g} to {max(own):.3g})" in beta.alt
    found = client_gains(results, "seen")
    gain = gain_figure("seen", found, results)
    assert (
        f"from {found[0].points:+.1f} ({found[0].client}) to {found[-1].points:+.1f} ({found[-1].client})" in gain.alt
    )


def test_every_client_has_a_mark_in_every_row(results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    beta = hyperparameter_boxes(rows, "beta")
    assert sum(len(group) for group in beta.marks) == 12 * 4
    shown = inline(beta, svg(beta), prefix="f1", clients={"client-03": 7})
    assert shown.count('data-client="7"') == 4
    value = next(row["value"] for row in rows if row["client"] == "client-03" and row["layer"] == "layer1.0.bn2")
    assert f'data-text="layer1.0.bn2 {value:.4g}"' in shown


def test_figures_in_the_page_have_its_colours_and_ids_of_their_own(rows: list[dict[str, Any]]) -> None:
    beta = hyperparameter_boxes(rows, "beta")
    text = svg(beta)
    first, second = (inline(beta, text, prefix=prefix, clients={}) for prefix in ("f1", "f2"))
    ids = [{part.split('"')[0] for part in shown.split(' id="')[1:]} for shown in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    assert "#0072b2" in text and "#0072b2" not in first and "var(--blue)" in first
    assert 'role="img"' in first and "DejaVu" not in first
    for reference in first.split("url(#")[1:]:
        assert reference.split(")")[0] in ids[0]


def test_the_sparsity_stands_under_the_rates(rows: list[dict[str, Any]]) -> None:
    """One tensor of five is left alone by all clients; it holds 60 of 100 values."""
    assert "Sparsity of the model: 0.20." in hyperparameter_boxes(rows, "eta").caption
    names = dict.fromkeys(row["layer"] for row in rows if row["kind"] == "eta")
    sizes = {name: 60 if name == "layer1.0.conv1.weight" else 10 for name in names}
    assert "Sparsity of the model: 0.60." in hyperparameter_boxes(rows, "eta", sizes=sizes).caption


def test_a_domain_s_file_has_a_name_of_its_own(rows: list[dict[str, Any]]) -> None:
    names = [hyperparameter_boxes(rows, "beta", group=group).name for group in ("a/b", "a b", "../x", "ok")]
    assert len(set(names)) == 4
    assert all(name.replace("-", "").isalnum() for name in names)


def test_the_map_leaves_cells_empty_that_are_not_finite() -> None:
    values = np.array([[0.0, 1.5, np.nan], [1.5, 0.0, np.inf], [np.nan, np.inf, np.nan]])
    drawing = distance_map(FEATURES[1], ["x", "y", "z"], values)
    assert len(drawing.figure.axes[0].patches) == 4
    assert drawing.alt.endswith("x and y +1.50.")
    assert "+1.50" in drawing.caption


def test_the_split_of_clients_whose_labels_are_unknown() -> None:
    clients = [
        ClientSplit(name="a", pool="seen", domain="d", counts=np.array([[4], [2], [2]])),
        ClientSplit(name="b", pool="unseen", domain="e", counts=np.array([[8], [2], [2]])),
    ]
    drawing = split_panel(clients, ["0", "1"])
    assert drawing.alt.startswith("seen: 1 clients of 4 to 4 training samples, d; unseen: 1 clients of 8 to 8")
    assert "classes" not in drawing.caption


def test_jitter_stays_in_its_band_and_repeats() -> None:
    assert np.abs(jitter(1000, 0.5)).max() <= 0.25
    assert np.array_equal(jitter(9, 1.0), jitter(9, 1.0))
