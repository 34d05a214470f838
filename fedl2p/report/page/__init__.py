"""`report.html`: one file that shows one run or several, from disk, without a network.

It runs one script, its own, which sorts tables, names the clients under the pointer, and shows those that are picked;
without it everything but the picked clients can be read all the same. Figures are matplotlib's, as SVG with handles for
the script: plotly's script alone would be 4 MB, and its figures could not be the files beside the page.
"""

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from fedl2p.io import write_atomically
from fedl2p.report.page import cost, learning, methods
from fedl2p.report.page.clients import as_json, client_data, number_clients
from fedl2p.report.page.html import Chapter, Page, pairs
from fedl2p.report.page.runs import side_by_side, unique_names
from fedl2p.report.saved_run import SavedRun, read_run

SECTIONS: tuple[tuple[str, Callable[[Chapter], str]], ...] = (
    ("Methods", methods.methods),
    ("Differences", methods.differences),
    ("Gain by client", methods.gains),
    ("Training", learning.training),
    ("Learned β and η", learning.recipes),
    ("Domains", learning.domains),
    ("Clients that failed", learning.failures),
    ("Who has what", learning.split),
    ("Clients", methods.client_tables),
    ("Cost", cost.cost),
    ("Learning rates", methods.rates),
    ("Versions", lambda chapter: pairs("Package", "Version", chapter.run.results.get("versions") or {})),
    ("Configuration", learning.config),
)

PICKER = """<section id="picked" hidden>
<h2>Picked clients</h2>
<p><label>Client <input id="pick" list="client-names" autocomplete="off" placeholder="name"></label>
<button type="button" id="clear">clear</button></p>
<datalist id="client-names"></datalist>
<div id="cards" class="gallery" aria-live="polite"></div>
<p class="soft">Click on a client's dot or name anywhere on this page to pick it, and again to put it back.</p>
</section>
<div id="bar" hidden></div>
"""


def write_report(folders: Sequence[str | os.PathLike[str]]) -> Path:
    """Reads runs and writes `report.html` and `figures/` into the folder of the first.

    Args:
        folders: of at least one run; finished or interrupted.

    Returns:
        The page's path.

    Raises:
        RunFolderError: a folder holds no run, a file of it is damaged, or the first folder cannot be written.
    """
    first = Path(folders[0])
    return write_page(first / "report.html", [read_run(folder) for folder in folders], figures=first / "figures")


def write_page(
    path: str | os.PathLike[str], runs: Sequence[SavedRun], *, figures: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the page, whole or not at all.

    Args:
        path: the file, usually `<run>/report.html`.
        runs: what is shown; what is missing of a run is left out, numbers may be None or NaN.
        figures: a folder that gets the figures of the first run, and those of all together, as SVG and PDF.

    Raises:
        RunFolderError: a figure or the page cannot be written.
    """
    numbers, names = number_clients(runs), unique_names(runs)
    page = Page(folder=None if figures is None else Path(figures), numbers=numbers)
    body = side_by_side(page, runs)
    for index, run in enumerate(runs):
        body += _chapter(Chapter(run, page, index, len(runs) == 1), names[index])
    title = "FedL2P run" if len(runs) == 1 else f"{len(runs)} FedL2P runs"
    return write_atomically(path, _document(title, page, body, as_json(client_data(runs, names))))


def _chapter(chapter: Chapter, name: str) -> str:
    """All that there is about one run; of several runs each folds by itself."""
    if not chapter.alone:
        chapter.page.contents.append((f"run-{chapter.index + 1}", name, 2))
    head = methods.head(chapter)
    content = head + "".join(chapter.section(title, part(chapter)) for title, part in SECTIONS)
    if chapter.alone:
        return content
    opened = " open" if chapter.index == 0 else ""
    return (
        f'<details class="run" id="run-{chapter.index + 1}"{opened}><summary><h2>{escape(name)}</h2></summary>\n'
        f"{content}</details>\n"
    )


def _document(title: str, page: Page, body: str, data: str) -> str:
    style, script = (
        resources.files(__package__).joinpath(name).read_text("utf-8") for name in ("style.css", "script.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page may show its own pictures and style and run its own script; nothing can make it load or run another.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    picker = PICKER if page.numbers else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{_contents(page)}"
        f"<main>\n{body}{picker}</main>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _contents(page: Page) -> str:
    """Links to the sections of level 2; nothing for a page of one section."""
    links = [f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, level in page.contents if level == 2]
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>\n' if len(links) > 1 else ""
