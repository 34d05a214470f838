"""The page holds all of a run, needs nothing else, and cannot be broken by what a run is called."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedl2p.errors import RunFolderError
from fedl2p.federation.state import RoundRecord
from fedl2p.report.page import write_page
from fedl2p.report.saved_run import SavedRun, plain_records

VOID = {"meta", "input"}
FIGURES = [
    *("accuracy", "gain-seen", "gain-unseen", "learning-curve", "distance-beta", "distance-eta"),
    *("beta", "beta-a", "beta-b", "eta", "eta-a", "eta-b"),
]


class Reader(HTMLParser):
    """Collects tables as rows of cell texts; fails on a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.heads: list[dict[str, str | None]] = []
        self.labels: list[str] = []
        self.text = ""
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.heads += [dict(attrs)] if tag == "th" else []
        self.labels += [dict(attrs).get("aria-label") or ""] if tag == "svg" else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.data = self.data or data
            return
        self.text += data
        if {"td", "th"} & set(self.open) and "small" not in self.open:
            self.rows[-1][-1] += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def write(path: Path, results: dict[str, Any], history: Any = (), rows: Any = (), **options: Any) -> Path:
    run = SavedRun(results=results, history=plain_records(history), recipes=rows)
    return write_page(path, [run], **options)


def test_the_page_holds_the_run(
    tmp_path: Path, results: dict[str, Any], history: list[RoundRecord], rows: list[dict[str, Any]]
) -> None:
    page = read(write(tmp_path / "report.html", results, history, rows, figures=tmp_path / "figures"))
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
    assert page.tags.count("figure") == page.tags.count("svg") == len(FIGURES)
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in FIGURES for kind in ("pdf", "svg"))


def test_the_best_of_each_pool_and_only_it_is_marked(tmp_path: Path, results: dict[str, Any]) -> None:
    text = write(tmp_path / "report.html", results).read_text()
    assert len(re.findall('<td class="best">', text)) == 2


def test_rates_that_were_tried_are_listed_and_not_put_into_the_table_of_methods(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    grid = [[0.025, 0.7601694897], [0.1 / 3, 0.5], [0.4, None], [0.8, math.inf]]  # as read back, and as measured
    results["methods"]["ft_bn_c"]["settings"] = {"rate": 0.1 / 3, "val_loss": 0.512345, "grid": grid}
    page = write(tmp_path / "report.html", results).read_text()
    methods, rates = page.partition("<h2>Learning rates</h2>")[::2]
    assert "<small>rate 0.0333, val loss 0.512</small>" in methods and "0.025" not in methods
    assert "0.025: 0.760, <b>0.0333: 0.500</b>, 0.4: diverges, 0.8: diverges</td>" in rates


def test_the_page_is_self_contained(
    tmp_path: Path, results: dict[str, Any], history: list[RoundRecord], rows: list[dict[str, Any]]
) -> None:
    """Links lead into the page itself; the only script that may run is the one whose digest the policy has."""
    path = write(tmp_path / "report.html", results, history, rows)
    page, text = read(path), path.read_text(encoding="utf-8")
    assert {"link", "iframe", "object", "base"} & set(page.tags) == set()
    assert all(link.startswith("#") for link in page.links)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert page.tags.count("script") == 2  # the data, and what reads them


def test_strings_of_the_user_stay_strings(tmp_path: Path, results: dict[str, Any]) -> None:
    evil = '<script>alert("x")</script>'
    methods = results["methods"]
    methods["fedl2p"]["label"] = evil
    methods["global"]["settings"] = {evil: evil}
    methods["global"]["seen"]["clients"] = {evil: {"accuracy": 0.5, "loss": 0.5, "count": 3}}
    results |= {"versions": {evil: evil}, "timings": {evil: 1}, "config": {"name": evil}, "seed": evil}
    results["rounds"] = {"last": evil, "best": evil}
    records = [RoundRecord(round=1, val_loss=1.0, failures={evil: evil})]
    path = write(tmp_path / "report.html", results, records)
    page = read(path)
    assert page.tags.count("script") == 2
    assert page.text.count(evil) >= 9
    assert "<script>alert" not in path.read_text(encoding="utf-8")
    assert evil in [client["name"] for client in json.loads(page.data)["clients"]]


def test_missing_parts_leave_no_empty_sections(tmp_path: Path) -> None:
    page = read(write(tmp_path / "report.html", {}))
    assert "section" not in page.tags
    assert "table" not in page.tags


def test_missing_numbers_become_dashes(tmp_path: Path) -> None:
    methods: dict[str, Any] = {
        "global": {"seen": {"accuracy": {"mean": math.nan, "sd": math.nan}, "loss": None}},
        "ft_bn_c": {"label": "FT", "seen": {"accuracy": {"mean": 0.5, "sd": None}, "clients": {"a": {}}}},
        "l2p": None,
    }
    page = read(write(tmp_path / "report.html", {"methods": methods, "rounds": {"best": None}}))
    dash = "–"  # noqa: RUF001
    assert ["global", dash, dash] in page.rows
    assert ["FT", "50.0", dash] in page.rows
    assert ["l2p", dash, dash] in page.rows
    assert ["a", dash, dash] in page.rows
    assert "nan" not in page.text


def test_config_text_is_shown_as_it_is(tmp_path: Path) -> None:
    text = "data:\n  name: ${oc.env:NOWHERE}  # as written\n"
    assert text in read(write(tmp_path / "report.html", {"config": text})).text


def test_a_figure_that_cannot_be_written_is_an_error_and_leaves_the_old_page(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(RunFolderError, match="Cannot write"):
        write(path, results, figures=tmp_path / "figures")
    assert path.read_text() == "old"


def test_only_what_there_is_gets_drawn(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    eta = [row for row in rows if row["kind"] == "eta" and row["domain"] == "a"]
    write(tmp_path / "report.html", {}, rows=eta, figures=tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["eta.pdf", "eta.svg"]


def test_headers_have_scopes_and_figures_have_texts(
    tmp_path: Path, results: dict[str, Any], history: list[RoundRecord], rows: list[dict[str, Any]]
) -> None:
    page = read(write(tmp_path / "report.html", results, history, rows))
    assert len(page.heads) > 50
    assert {head.get("scope") for head in page.heads} == {"col", "row"}
    assert all(re.search(r"\d", label) for label in page.labels)


def test_the_contents_lead_to_every_section(
    tmp_path: Path, results: dict[str, Any], history: list[RoundRecord], rows: list[dict[str, Any]]
) -> None:
    text = write(tmp_path / "report.html", results, history, rows).read_text(encoding="utf-8")
    links = re.findall(r'<li><a href="#([^"]+)">', text)
    assert {"methods", "gain-by-client", "training", "learned-beta-and-eta", "clients", "configuration"} <= set(links)
    assert set(links) == set(re.findall(r'<section id="([^"]+)">', text))


def test_the_script_knows_what_every_client_has(
    tmp_path: Path, results: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    data = json.loads(read(write(tmp_path / "report.html", results, rows=rows)).data)
    first = data["clients"][0]
    own = [row["value"] for row in rows if row["client"] == "client-00" and row["kind"] == "beta"]
    assert first["name"] == "client-00" and first["domain"] == "a"
    assert first["beta"] == pytest.approx(own, rel=1e-4)
    layer = data["runs"][0]["layers"]["beta"][1]
    values = sorted(row["value"] for row in rows if row["layer"] == "layer1.0.bn2")
    assert layer[0] == "layer1.0.bn2"
    assert layer[1:] == pytest.approx([values[0], (values[5] + values[6]) / 2, values[-1]], rel=1e-4)
    seen = next(client for client in data["clients"] if client["name"] == "seen-03")
    accuracy = results["methods"]["ft_bn_c"]["seen"]["clients"]["seen-03"]["accuracy"]
    assert ["FT (BN C)", accuracy, 1 - accuracy] in seen["methods"]


def test_rounds_of_a_client_that_fails_again_and_again_are_one_row(tmp_path: Path) -> None:
    records = [
        RoundRecord(round=number, val_loss=1.0, failures={"a": "no reply"} if number in (2, 5, 6, 7) else {})
        for number in range(9)
    ]
    page = read(write(tmp_path / "report.html", {}, records))
    assert ["2, 5 to 7", "a", "no reply"] in page.rows


def test_layers_at_a_limit_are_named(tmp_path: Path) -> None:
    values = {"bn1": [1.0, 1.0, 0.4], "bn2": [0.2, 0.0, 0.3]}
    rows = [
        {"client": str(place), "domain": "all", "pool": "seen", "kind": "beta", "layer": layer, "value": value}
        for layer, own in values.items()
        for place, value in enumerate(own)
    ]
    page = read(write(tmp_path / "report.html", {}, rows=rows))
    assert "Layers at a limit, with the share of the clients: β is 1 (the client's alone): bn1 (67 %)" in page.text


def test_cost_as_in_the_appendix(tmp_path: Path, history: list[RoundRecord]) -> None:
    ways = {"down": 2.5e6, "up": 1e6}
    cost = {
        "memory": {"process": 1.3e9},
        "bytes": {"lambda": 94900, "global_model": 4.4e7, "rounds": ways, "validation": {"down": 1e6, "up": 0}},
        "flops": {"forward": 1e9, "finetune": 4.5e10, "statistics": 1e9, "paper_statistics": 2e9, "meta_nets": 5e4},
    }
    page = read(write(tmp_path / "report.html", {"cost": cost}, history))
    assert ["largest process", "1.3 GB"] in page.rows
    assert ["lambda both ways, sampled clients", "2.5 MB", "1 MB"] in page.rows
    assert ["all", "3.5 MB", "1 MB"] in page.rows
    assert ["statistics, two passes (the paper)", "2 GFLOP", "4.4 %"] in page.rows
    assert ["a round, for each of its clients (median)", "1.000 s"] in page.rows
    assert "Lambda is 94.9 kB, theta_g 44 MB." in page.text
