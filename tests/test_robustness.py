"""The benchmark of lying clients runs, and says what its table shows."""

import json
from pathlib import Path

import pytest

from benchmarks.robustness import KINDS, SHARES, main, table


@pytest.mark.slow
def test_the_quick_benchmark_of_lying_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--output", str(tmp_path / "new")])
    results = json.loads((tmp_path / "new" / "robustness.json").read_text())
    honest = results["honest"]["accuracy"]
    assert 50 < honest <= 100
    assert {(row["kind"], row["share"]) for row in results["lies"]} == {(k, s) for k in KINDS for s in SHARES}
    assert len(KINDS) >= 7
    for row in results["lies"]:
        assert row["robust"]["completed"], row
        assert row["robust"]["accuracy"] >= honest - 2, row
    named = {row["kind"] for row in results["lies"] if row["named"]}
    assert {"error", "no arrays", "not finite", "far away", "impossible vote"} <= named
    assert table(results) in capsys.readouterr().out
