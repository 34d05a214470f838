"""The page holds all of a run, needs nothing else, and cannot be broken by what a run is called."""

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedl2p.errors import RunFolderError
from fedl2p.federation.state import RoundRecord
from fedl2p.report.figures import save_figures
from fedl2p.report.page import write_page

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Collects tables as rows of cell texts; fails on a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open) and "small" not in self.open:
            self.rows[-1][-1] += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_holds_the_run(
    tmp_path: Path, results: dict[str, Any], history: list[RoundRecord], rows: list[dict[str, Any]]
) -> None:
    figures = save_figures(tmp_path / "figures", results=results, history=history, rows=rows)
    page = read(write_page(tmp_path / "report.html", results, history, figures))
    fedl2p = results["methods"]["fedl2p"]
    for pool in ("seen", "unseen"):
        accuracy = fedl2p[pool]["accuracy"]
        text = f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f}"
        assert any(row[0] == "FedL2P" and text in row for row in page.rows)
    assert ["Method", "seen, n = 8", "loss", "unseen, n = 4", "loss"] in page.rows
    assert ["FedL2P minus FT (BN C)", "seen", "+8.1", "+5.0 to +11.1"] in page.rows
    assert ["FedL2P minus FT (BN C)", "unseen", "-2.0", "–"] in page.rows  # noqa: RUF001
    assert ["9", "seen-02", "out of <memory>"] in page.rows
    assert ["rounds", "1,234.5 s"] in page.rows
    assert ["torch", "2.15.0"] in page.rows
    assert "seed 7; 60 rounds, the best was 47; validation loss from 0.910 to 0.320; failed clients: 1" in page.text
    assert "name: digits" in page.text
    assert page.tags.count("img") == 4


def test_the_best_of_each_pool_and_only_it_is_marked(tmp_path: Path, results: dict[str, Any]) -> None:
    text = write_page(tmp_path / "report.html", results).read_text()
    assert len(re.findall('<td class="best">', text)) == 2


def test_rates_that_were_tried_are_listed_and_not_put_into_the_table_of_methods(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    grid = [[0.025, 0.7601694897], [0.1 / 3, 0.5], [0.4, None], [0.8, math.inf]]  # as read back, and as measured
    results["methods"]["ft_bn_c"]["settings"] = {"rate": 0.1 / 3, "val_loss": 0.512345, "grid": grid}
    page = write_page(tmp_path / "report.html", results).read_text()
    methods, rates = page.partition("<h2>Learning rates</h2>")[::2]
    assert "<small>rate 0.0333, val loss 0.512</small>" in methods and "0.025" not in methods
    assert "0.025: 0.760, <b>0.0333: 0.500</b>, 0.4: diverges, 0.8: diverges</td>" in rates


def test_the_page_is_self_contained(tmp_path: Path, results: dict[str, Any], history: list[RoundRecord]) -> None:
    figures = save_figures(tmp_path / "figures", results=results, history=history)
    page = read(write_page(tmp_path / "report.html", results, history, figures))
    assert {"script", "link", "iframe"} & set(page.tags) == set()
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert base64.b64decode(page.links[0].split(",")[1]) == figures["accuracy"].read_bytes()


def test_strings_of_the_user_stay_strings(tmp_path: Path, results: dict[str, Any]) -> None:
    evil = '<script>alert("x")</script>'
    methods = results["methods"]
    methods["fedl2p"]["label"] = evil
    methods["global"]["settings"] = {evil: evil}
    methods["global"]["seen"]["clients"] = {evil: {"accuracy": 0.5, "loss": 0.5, "count": 3}}
    results |= {"versions": {evil: evil}, "timings": {evil: 1}, "config": {"name": evil}, "seed": evil}
    results["rounds"] = {"last": evil, "best": evil}
    records = [RoundRecord(round=1, val_loss=1.0, failures={evil: evil})]
    page = read(write_page(tmp_path / "report.html", results, records))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 9


def test_missing_parts_leave_no_empty_sections(tmp_path: Path) -> None:
    page = read(write_page(tmp_path / "report.html", {}))
    assert "section" not in page.tags
    assert "table" not in page.tags


def test_missing_numbers_become_dashes(tmp_path: Path) -> None:
    methods: dict[str, Any] = {
        "global": {"seen": {"accuracy": {"mean": math.nan, "sd": math.nan}, "loss": None}},
        "ft_bn_c": {"label": "FT", "seen": {"accuracy": {"mean": 0.5, "sd": None}, "clients": {"a": {}}}},
        "l2p": None,
    }
    page = read(write_page(tmp_path / "report.html", {"methods": methods, "rounds": {"best": None}}))
    dash = "–"  # noqa: RUF001
    assert ["global", dash, dash] in page.rows
    assert ["FT", "50.0", dash] in page.rows
    assert ["l2p", dash, dash] in page.rows
    assert ["a", dash, dash] in page.rows
    assert "nan" not in page.text


def test_config_text_is_shown_as_it_is(tmp_path: Path) -> None:
    text = "data:\n  name: ${oc.env:NOWHERE}  # as written\n"
    assert text in read(write_page(tmp_path / "report.html", {"config": text})).text


def test_a_missing_figure_is_an_error_and_leaves_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(RunFolderError, match="Cannot read the figure"):
        write_page(path, {}, [], {"beta": tmp_path / "none.png"})
    assert path.read_text() == "old"
