"""The pieces that the page is made of: sections, tables, figures and numbers as HTML."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from fedl2p.io import write_atomically
from fedl2p.report.drawing import Drawing, inline, pdf, svg
from fedl2p.report.saved_run import SavedRun
from fedl2p.report.table import NOTHING


@dataclass
class Page:
    """What the sections of one page share.

    Attributes:
        folder: where the figures' files go; None writes none.
        numbers: of the clients, by run and name, as the page's script counts them.
        contents: id and title of the sections so far, with their level.
        shown: number of figures so far.
    """

    folder: Path | None = None
    numbers: dict[tuple[int, str], int] = field(default_factory=dict)
    contents: list[tuple[str, str, int]] = field(default_factory=list)
    shown: int = 0

    def section(self, title: str, content: str, *, key: str = "", level: int = 2) -> str:
        """A section with a heading and a line in the contents; nothing where there is no content."""
        if not content:
            return ""
        name = f"{key}{title}".lower().replace(" ", "-").replace("β", "beta").replace("η", "eta")
        self.contents.append((name, title, level))
        return f'<section id="{escape(name)}">\n<h{level}>{escape(title)}</h{level}>\n{content}</section>\n'

    def figure(self, drawing: Drawing, *, run: int = 0) -> str:
        """A figure with its caption; its files are written beside."""
        text = svg(drawing)
        if self.folder is not None and run == 0:
            write_atomically(self.folder / f"{drawing.name}.svg", text)
            write_atomically(self.folder / f"{drawing.name}.pdf", pdf(drawing))
        self.shown += 1
        clients = {name: number for (owner, name), number in self.numbers.items() if owner == run}
        shown = inline(drawing, text, prefix=f"f{self.shown}", clients=clients)
        caption = f"<b>{escape(drawing.title)}</b> {escape(drawing.caption)}".strip()
        return f"<figure>{shown}\n<figcaption>{caption}</figcaption></figure>\n"


@dataclass(frozen=True)
class Chapter:
    """One run on a page.

    Attributes:
        run: what is shown.
        page: where.
        index: its place among the page's runs.
        alone: whether there are no others.
    """

    run: SavedRun
    page: Page
    index: int = 0
    alone: bool = True

    def section(self, title: str, content: str) -> str:
        """A section of this run."""
        key, level = ("", 2) if self.alone else (f"run-{self.index + 1}-", 3)
        return self.page.section(title, content, key=key, level=level)

    def figure(self, drawing: Drawing) -> str:
        """A figure of this run."""
        return self.page.figure(drawing, run=self.index)

    def client_head(self, name: str) -> str:
        """The first cell of a client's row, which the script makes a button."""
        number = self.page.numbers.get((self.index, name))
        known = f' data-client="{number}"' if number is not None else ""
        return f'<th scope="row"{known}>{escape(name)}</th>'


def gallery(figures: Iterable[str]) -> str:
    """Figures side by side where the screen is wide."""
    content = "".join(figures)
    return f'<div class="gallery">\n{content}</div>\n' if content else ""


def heads(*titles: str, text: bool = False) -> str:
    """The header cells of a table; with `text` all but the first are over words instead of numbers."""
    kind = ' class="text"' if text else ""
    return "".join(f'<th scope="col"{kind if i else ""}>{escape(title)}</th>' for i, title in enumerate(titles))


def row(first: str, *rest: str, text: bool = False) -> str:
    """A row of a table from cells of HTML; the first is its header, as HTML or as a whole cell."""
    head = first if first.startswith("<th") else f'<th scope="row">{first}</th>'
    kind = ' class="text"' if text else ""
    cells = "".join(cell if cell.startswith("<td") else f"<td{kind}>{cell}</td>" for cell in rest)
    return f"<tr>{head}{cells}</tr>\n"


def table(head: str, body: Sequence[str] | Iterable[str], caption: str = "", *, sortable: bool = False) -> str:
    """A table that scrolls sideways by itself where it is too wide; nothing where there is no row."""
    rows = "".join(body)
    if not rows:
        return ""
    note = f"<caption><span>{caption}</span></caption>" if caption else ""
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="wide" tabindex="0"><table{kind}>{note}\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
    )


def pairs(left: str, right: str, values: Mapping[str, Any], caption: str = "") -> str:
    """A table of two columns."""
    return table(heads(left, right), [row(escape(str(key)), plain(value)) for key, value in values.items()], caption)


def folded(title: str, content: str) -> str:
    """Content that opens when asked for."""
    return f"<details><summary>{escape(title)}</summary>\n{content}</details>\n" if content else ""


def note(text: str) -> str:
    """A paragraph of soft text; nothing where there is none."""
    return f'<p class="soft">{escape(text)}</p>\n' if text else ""


def plain(value: Any) -> str:
    """A value as text: three digits of a fraction, a dash for None."""
    return NOTHING if value is None else escape(f"{value:.3g}" if isinstance(value, float) else str(value))


def fixed(value: float, digits: int = 3) -> str:
    """A number with fixed digits, without them where it is very large, a dash where it is not finite."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in %, with one digit."""
    return fixed(100 * value, 1)


def amount(value: float, unit: str) -> str:
    """A large number with a decimal prefix, such as `1.25 MB`."""
    if not math.isfinite(value):
        return NOTHING
    step = min(int(math.log10(value) // 3), 5) if value >= 1000 else 0
    return f"{value / 1000**step:,.3g} {['', 'k', 'M', 'G', 'T', 'P'][step]}{unit}"
