"""Validation loss by round, on an axis that no single spike rules."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedl2p.report.drawing import BLUE, GREY, LINE, ORANGE, POOL_COLOURS, Drawing, legend, new_panel, say_empty
from fedl2p.report.saved_run import plain_records
from fedl2p.report.table import number

Array = NDArray[np.float64]
FEW = 8  # losses that are too few to call one of them a spike


def loss_limit(losses: Array) -> float:
    """Where the axis ends: at the largest loss, unless some are far above nearly all others.

    Far is more than 1.5 times the range of the middle 80 % above it.

    Args:
        losses: of any shape; those that are not finite do not count.
    """
    finite = losses[np.isfinite(losses)]
    if not finite.size:
        return math.nan
    if finite.size < FEW:
        return float(finite.max())
    low, high = np.quantile(finite, (0.1, 0.9))
    return float(min(finite.max(), high + 1.5 * (high - low)))


def learning_curve(history: Sequence[Any]) -> Drawing:
    """The validation loss by round, with the best round marked, and the loss while training.

    Args:
        history: the round records, or their dictionaries from `metrics.jsonl`; losses may be None or NaN and leave a
            gap.
    """
    figure, axes = new_panel(3.4)
    records = plain_records(history)
    rounds = _numbers(records, "round")
    val_loss, meta_loss = _numbers(records, "val_loss"), _numbers(records, "meta_loss")
    drawing = Drawing("learning-curve", "Validation loss by round", "", "No finite loss.", figure)
    if not np.isfinite(val_loss).any():
        say_empty(axes)
        return drawing
    if np.isfinite(meta_loss).any():
        axes.plot(rounds, meta_loss, color=GREY, linewidth=1, label="sampled clients, while training")
    marker = "o" if len(records) <= 30 else ""
    axes.plot(rounds, val_loss, color=BLUE, linewidth=2, marker=marker, markersize=4, label="fixed cohort, validation")
    best = int(np.nanargmin(np.where(np.isfinite(val_loss), val_loss, np.nan)))
    label = f"best: {val_loss[best]:.3f} in round {rounds[best]:.0f}"
    axes.plot(rounds[best], val_loss[best], "D", color=ORANGE, markersize=7, label=label)
    losses = np.stack([val_loss, meta_loss])
    above = _limit(axes, rounds, losses, top=loss_limit(losses))
    _finish(axes)
    drawing.caption = (
        "Loss after fine-tuning, a mean over samples; the nets of the best round are the ones that were kept. " + above
    )
    drawing.alt = (
        f"Validation loss over {len(records)} records: {_said(val_loss[0])} in round {rounds[0]:.0f}, "
        f"best {val_loss[best]:.3f} in round {rounds[best]:.0f}, "
        f"last {_said(val_loss[-1])} in round {rounds[-1]:.0f}. {above}"
    ).strip()
    return drawing


def learning_curves(histories: Mapping[str, Sequence[Any]]) -> Drawing:
    """The validation loss of several runs in one figure.

    Args:
        histories: round records by the run's name.
    """
    figure, axes = new_panel(3.2 + 0.2 * len(histories))
    drawing = Drawing("learning-curves", "Validation loss of all runs", "", "No finite loss.", figure)
    said, everything = [], []
    for index, (name, history) in enumerate(histories.items()):
        records = plain_records(history)
        rounds, losses = _numbers(records, "round"), _numbers(records, "val_loss")
        if np.isfinite(losses).any():
            style = ("-", "--", ":", "-.")[index // len(POOL_COLOURS) % 4]
            colour = POOL_COLOURS[index % len(POOL_COLOURS)]
            axes.plot(rounds, losses, style, color=colour, linewidth=1.5, label=name)
            best = int(np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)))
            said.append(f"{name}: best {losses[best]:.3f} in round {rounds[best]:.0f}")
            everything.append((rounds, losses))
    if not everything:
        say_empty(axes)
        return drawing
    top = max(loss_limit(losses) for _, losses in everything)
    above = _limit(axes, *(np.concatenate(parts) for parts in zip(*everything, strict=True)), top=top)
    _finish(axes)
    drawing.caption = f"Of the fixed cohort of seen clients, after fine-tuning. {above}"
    drawing.alt = f"{'; '.join(said)}. {above}".strip()
    return drawing


def _limit(axes: Axes, rounds: Array, losses: Array, *, top: float) -> str:
    """Ends the axis at `top`, marks every loss beyond it by a triangle, and says so."""
    low = float(np.nanmin(np.where(np.isfinite(losses), losses, np.nan)))
    margin = 0.05 * ((top - low) or abs(top) or 1.0)
    axes.set_ylim(low - margin, top + 3 * margin)
    rows = np.atleast_2d(losses)
    places = np.broadcast_to(rounds, rows.shape)
    beyond = (rows > top) | np.isposinf(rows)
    if not beyond.any():
        return ""
    axes.plot(places[beyond], np.full(beyond.sum(), top + 1.5 * margin), "^", color=ORANGE, markersize=6, zorder=5)
    finite = rows[beyond][np.isfinite(rows[beyond])]
    most = f", up to {finite.max():,.4g}" if finite.size else ""
    return f"Triangles: {int(beyond.sum())} losses above the axis{most}."


def _finish(axes: Axes) -> None:
    axes.set_xlabel("Round")
    axes.set_ylabel("Loss after fine-tuning")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    legend(axes)


def _numbers(records: Sequence[Mapping[str, Any]], key: str) -> Array:
    return np.array([number(record.get(key)) for record in records], dtype=np.float64)


def _said(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "not finite"
