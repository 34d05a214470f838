"""A run that is killed again and again ends as one that never was."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedl2p

ROOT = Path(fedl2p.__file__).parents[1]
KILLS = 20


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(mine: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path / 'code'}"}

    def start(name: str) -> subprocess.Popen[bytes]:
        resume = ["--resume"] if (tmp_path / name / "config.yaml").is_file() else []
        command = [sys.executable, "-m", "fedl2p.cli", "run", mine, "federation.rounds=4"]
        command += [f"output_dir={tmp_path / name}", *resume]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    started = time.monotonic()
    assert start("whole").wait() == 0
    seconds, draws, kills = time.monotonic() - started, random.Random(4), 0
    while kills < KILLS:
        process = start("run")
        try:
            assert process.wait(timeout=draws.uniform(0.4, 1.0) * seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert start("run").wait() == 0
    for name in ("meta_nets.safetensors", "global_model.safetensors", "checkpoints/l2p.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    run, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole"))
    assert all(run[key] == whole[key] for key in ("methods", "comparisons", "rounds"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith(".tmp")]
