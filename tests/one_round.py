"""The main job on any data module, as short as it can be: what shows that one can train on it."""

import json
from pathlib import Path
from typing import Any

import fedl2p
from fedl2p.cli import main

_BASE = Path(fedl2p.__file__).parents[1] / "configs" / "digits.yaml"
_SHORT = [
    "threads=1",
    "pretraining.rounds=1",
    "pretraining.pool=seen",
    "client.finetune_epochs=1",
    "client.meta_iterations=1",
    "federation.rounds=1",
    "federation.client_fraction=1.0",
    "baselines.rates=[0.01, 0.1]",
    "wandb.mode=disabled",
]


def run_one_round(
    class_path: str, init_args: dict[str, Any], output: Path, *, in_channels: int = 1, num_classes: int = 10
) -> dict[str, Any]:
    """Pretrains, tunes, learns for a round and tests, with a net of three small layers.

    Args:
        class_path: Of the data module.
        init_args: Of the data module.
        output: The run's folder.
        in_channels: Of the inputs.
        num_classes: Of the data.

    Returns:
        Every method's results.
    """
    arguments = json.dumps(init_args)  # which is YAML as well
    model = f"{{widths: [4, 4, 4], in_channels: {in_channels}, num_classes: {num_classes}}}"
    data = [f"data.class_path={class_path}", f"data.init_args={arguments}"]
    assert main(["run", str(_BASE), *data, f"model.init_args={model}", *_SHORT, f"output_dir={output}"]) == 0
    methods: dict[str, Any] = json.loads((output / "results.json").read_text())["methods"]
    for method in methods.values():
        for pool in {"seen", "unseen"} & set(method):
            assert 0 <= method[pool]["accuracy"]["mean"] <= 1
    return methods
