"""What the run cost: time, memory, bytes and operations, as in Appendix C of the FedL2P paper."""

import math
from collections.abc import Mapping
from html import escape
from statistics import median
from typing import Any

from fedl2p.report.page.html import Chapter, amount, heads, pairs, row, table
from fedl2p.report.table import NOTHING, number

PHASES = {
    "pretraining": "FedAvg, theta_g both ways",
    "once": "theta_g to each seen client; its statistics back",
    "rounds": "lambda both ways, sampled clients",
    "validation": "lambda to the validation cohort; a loss back",
}


def cost(chapter: Chapter) -> str:
    """Time, memory, bytes and floating-point operations; each table only where its numbers are known."""
    found = chapter.run.results.get("cost") or {}
    return _time(chapter) + _memory(found.get("memory") or {}) + _bytes(found) + _operations(found.get("flops") or {})


def _time(chapter: Chapter) -> str:
    timings = chapter.run.results.get("timings") or {}
    values = {str(stage): f"{number(seconds):,.1f} s" for stage, seconds in timings.items()}
    seconds, shares = [], []
    for record in chapter.run.history:
        took, clients = number(record.get("seconds")), len(record.get("clients") or ())
        if record.get("round") and math.isfinite(took):
            seconds.append(took)
            shares += [took / clients] if clients else []
    if seconds:
        values["a round (median)"] = f"{median(seconds):,.2f} s"
    if shares:
        values["a round, for each of its clients (median)"] = f"{median(shares):,.3f} s"
    return pairs(
        "Stage", "Time", values, "Wall time; a round is the clients' meta updates and the validation after it."
    )


def _memory(memory: Mapping[str, Any]) -> str:
    labels = {"process": "largest process", "gpu": "GPU, tensors"}
    values = {labels.get(key, key): amount(number(value), "B") for key, value in memory.items()}
    return pairs("Peak memory", "Size", values, "The most at any time, with Python and its libraries.")


def _bytes(found: Mapping[str, Any]) -> str:
    sent: Mapping[str, Any] = found.get("bytes") or {}
    body, totals = [], [0.0, 0.0]
    for phase, text in PHASES.items():
        if phase in sent:
            ways = [number(sent[phase].get(way)) for way in ("down", "up")]
            totals = [total + value for total, value in zip(totals, ways, strict=True)]
            body.append(row(escape(text), *(amount(value, "B") for value in ways)))
    if not body:
        return ""
    body.append(row("all", *(f"<b>{amount(total, 'B')}</b>" for total in totals)))
    own, whole = number(sent.get("lambda")), number(sent.get("global_model"))
    caption = (
        f"Bytes of tensors over the whole run, down to the clients and up from them, without framing. Lambda is "
        f"{amount(own, 'B')}, theta_g {amount(whole, 'B')}."
    )
    return table(heads("What travels", "down", "up"), body, caption)


def _operations(flops: Mapping[str, Any]) -> str:
    forward, finetune = number(flops.get("forward")), number(flops.get("finetune"))
    if not math.isfinite(forward):
        return ""

    def share(value: float) -> str:
        return f"{100 * value / finetune:.1f} %" if finetune > 0 else NOTHING

    rows = [("one forward pass", forward), ("fine-tuning, all epochs", finetune)]
    rows += [("statistics, one pass (here)", number(flops.get("statistics")))]
    rows += [("statistics, two passes (the paper)", number(flops.get("paper_statistics")))]
    body = [row(text, amount(value, "FLOP"), share(value)) for text, value in rows if math.isfinite(value)]
    nets = number(flops.get("meta_nets"))
    caption = (
        "For one image: matrix products and convolutions, a multiply-add as two, a backward pass as two forward ones. "
        f"The nets themselves take {amount(nets, 'FLOP')} once a client."
    )
    return table(heads("Operations", "for an image", "of fine-tuning"), body, caption)
