"""The example of a new data set in docs/data.md runs as it is printed."""

import re
import textwrap
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_documented_data_set_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text().partition("## A data set of your own")[2]
    code = re.search(r"\n\n((?:    .*\n|\n)+)", section)
    assert code is not None
    (tmp_path / "stars.py").write_text(textwrap.dedent(code.group(1)))
    monkeypatch.syspath_prepend(tmp_path)
    from stars import Stars  # type: ignore[import-not-found]  # written above

    data = Stars(seed=3, alpha=0.5)
    data.check()
    assert [len(data.pool(pool)) for pool in ("pretrain", "seen", "unseen")] == [4, 12, 4]
    assert data.fingerprint() == Stars(seed=3, alpha=0.5).fingerprint()
    assert len(code.group(1).strip().splitlines()) < 60
