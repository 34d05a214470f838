"""A made-up run with everything a report can show."""

import math
from typing import Any

import numpy as np

from fedl2p.federation.state import RoundRecord
from fedl2p.report.analysis import spread

LABELS = {
    "global": "Global model",
    "ft_bn_c": "FT (BN C)",
    "ft_bn_g": "FT (BN G)",
    "ft_bn_i": "FT (BN I)",
    "l2p": "L2P",
    "fedl2p": "FedL2P",
    "fedl2p_shuffled": "FedL2P, recipes shuffled",
}
MEANS = {"global": 0.6, "ft_bn_c": 0.8, "ft_bn_g": 0.75, "ft_bn_i": 0.78, "l2p": 0.7, "fedl2p": 0.88}
LAYERS = ("layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "layer2.0.downsample.1")
TENSORS = ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight", "layer2.0.conv1.weight", "fc.weight")


def measured(accuracies: dict[str, float]) -> dict[str, Any]:
    """One method on one pool, in the form of `results.json`."""
    values = list(accuracies.values())
    return {
        "accuracy": spread(values),
        "loss": spread([1 - value for value in values]),
        "clients": {name: {"accuracy": v, "loss": 1 - v, "count": 40} for name, v in accuracies.items()},
    }


def make_results() -> dict[str, Any]:
    random = np.random.default_rng(0)
    methods: dict[str, Any] = {}
    for method, label in LABELS.items():
        methods[method] = {"label": label, "settings": {"rate": 0.1, "epochs": 15} if "ft" in method else {}}
        for pool, count in (("seen", 8), ("unseen", 4)):
            if method == "l2p" and pool == "unseen":
                continue
            mean = MEANS.get(method, 0.83) - 0.05 * (pool == "unseen")
            drawn = np.clip(random.normal(mean, 0.05, count), 0, 1)
            methods[method][pool] = measured({f"{pool}-{i:02d}": float(v) for i, v in enumerate(drawn)})
    return {
        "seed": 7,
        "config": {"data": {"name": "digits", "clients": 12}, "note": "<b>bold?</b>", "rounds": 60},
        "versions": {"torch": "2.15.0", "flwr": "1.41.0"},
        "timings": {"pretraining": 12.34, "rounds": 1234.5},
        "rounds": {"best": 47, "last": 60, "best_val_loss": 0.32, "first_val_loss": 0.91, "failures": 1},
        "methods": methods,
        "comparisons": [
            {"a": "fedl2p", "b": "ft_bn_c", "pool": "seen", "mean": 0.081, "low": 0.05, "high": 0.111},
            {"a": "fedl2p", "b": "ft_bn_c", "pool": "unseen", "mean": -0.02, "low": math.nan, "high": math.nan},
        ],
    }


def make_history() -> list[RoundRecord]:
    random = np.random.default_rng(1)
    records = [RoundRecord(round=0, val_loss=0.91, seconds=3.0)]
    for number in range(1, 61):
        loss = 0.3 + 0.6 * math.exp(-number / 12)
        records.append(
            RoundRecord(
                round=number,
                val_loss=float(loss + random.normal(0, 0.01)),
                meta_loss=float(loss + 0.05 + random.normal(0, 0.03)),
                clients=("seen-00", "seen-01"),
                failures={"seen-02": "out of <memory>"} if number == 9 else {},
                seconds=2.0,
            )
        )
    return records


def make_rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(2)
    made: list[dict[str, Any]] = []
    for client in range(12):
        who = {"client": f"client-{client:02d}", "domain": "ab"[client % 2], "pool": "seen" if client < 8 else "unseen"}
        for index, layer in enumerate(LAYERS):
            value = float(np.clip(random.normal(0.2 + 0.2 * index, 0.15), 0, 1))
            made.append({**who, "kind": "beta", "layer": layer, "value": value})
        for index, tensor in enumerate(TENSORS):
            value = 0.0 if index == 1 else float(random.normal(0.02 * index, 0.01))
            made.append({**who, "kind": "eta", "layer": tensor, "value": value})
    return made
