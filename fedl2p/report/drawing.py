"""One figure of a report: drawn once with matplotlib, written as SVG and PDF, and put into the page in its colours.

Figures are as wide as a telephone, so that their text stays legible there; on a wide screen several stand in a row.
"""

import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from fedl2p.io import write_atomically

# Okabe and Ito's colours, which people with colour blindness can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#767676"
INK, LINE, PAPER = "#1b1f24", "#d8dee4", "#fefefe"
POOL_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY)
# In the page a colour is a variable of its style, which differs by day and night.
VARIABLES = {
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PINK: "pink",
    SKY: "sky",
    GREY: "grey",
    INK: "ink",
    LINE: "line",
    PAPER: "paper",
}
WIDTH = 8.0  # inches, of pictures that are not for the page
PANEL = 4.6  # inches, 331 points, which the page shows as 331 pixels or more
DPI = 150
TEXT = 11  # points
SMALL = 10
MAX_MARKS = 2500  # clients' marks in one figure; more would make the page slow

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_MARKS = "marks-"


@dataclass(frozen=True)
class Mark:
    """A client's mark in a figure.

    Attributes:
        client: whose.
        text: what it says, such as `+3.1 points`.
    """

    client: str
    text: str


@dataclass
class Drawing:
    """A figure with what a page says about it.

    Attributes:
        name: of its files; letters, digits and dashes.
        title: above it.
        caption: how to read it.
        alt: its numbers in words, for those who do not see it.
        figure: what is drawn.
        marks: by group, the clients whose marks were drawn, in order.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    marks: list[list[Mark]] = field(default_factory=list)

    def scatter(
        self, axes: Axes, x: Sequence[float], y: Sequence[float], marks: Sequence[Mark], *, colour: str, size: float = 9
    ) -> None:
        """Draws a dot for each client; the page makes them answer to the pointer."""
        axes.scatter(x, y, s=size, color=colour, alpha=0.75, linewidths=0, zorder=3).set_gid(
            f"{_MARKS}{len(self.marks)}"
        )
        self.marks.append(list(marks))


def new_canvas(height: float, *, width: float = WIDTH) -> Figure:
    """An empty figure with constrained layout, away from matplotlib's windows.

    Args:
        height: inches.
        width: inches.
    """
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05))
    FigureCanvasAgg(figure)
    return figure


def new_panel(height: float) -> tuple[Figure, Axes]:
    """A figure for the page, with one pair of axes in the page's colours.

    Args:
        height: inches.
    """
    figure = new_canvas(height, width=PANEL)
    axes = figure.subplots()
    use_page_colours(axes)
    return figure, axes


def use_page_colours(axes: Axes) -> None:
    """Gives axes of a panel the colours and the text sizes of the page."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=SMALL, color=GREY)
    axes.set_facecolor("none")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, size=TEXT)


def say_empty(axes: Axes) -> None:
    """Writes into axes that there is nothing to draw."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, "Nothing to draw: no finite values.", ha="center", va="center", color=INK, size=TEXT)


def jitter(count: int, width: float) -> NDArray[np.float64]:
    """Offsets that keep dots at the same place apart: evenly filled, the same at every call, shape (count,).

    Args:
        count: of dots.
        width: of the band that they fill around 0.
    """
    golden = 0.5 * (math.sqrt(5) - 1)
    return np.asarray(width * (np.arange(1, count + 1) * golden % 1 - 0.5))


def legend(axes: Axes, **options: Any) -> None:
    """A legend above the axes in the page's colours."""
    place: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0, 1),
        "borderaxespad": 0.2,
        "handlelength": 1.2,
    } | options
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, **place)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    # Without matplotlib's version in it, the same run gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _lay_out(figure: Figure) -> None:
    """Places the axes once, by their texts alone: what is drawn inside them takes most of the time and no place."""
    if figure.get_layout_engine() is None:
        return
    for axes in figure.axes:
        for artist in (*axes.lines, *axes.collections, *axes.patches, *axes.images):
            artist.set_in_layout(False)
    figure.draw_without_rendering()
    figure.set_layout_engine(None)


def svg(drawing: Drawing) -> str:
    """The figure as an SVG file; the same figure gives the same text."""
    _lay_out(drawing.figure)
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Title": drawing.title}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": drawing.name}):
        drawing.figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return buffer.getvalue()


def pdf(drawing: Drawing) -> bytes:
    """The figure as the bytes of a PDF file."""
    _lay_out(drawing.figure)
    buffer = io.BytesIO()
    metadata = {"CreationDate": None, "Creator": None, "Producer": None, "Title": drawing.title}
    drawing.figure.savefig(buffer, format="pdf", facecolor="white", metadata=metadata)
    return buffer.getvalue()


def save_drawings(folder: str | os.PathLike[str], drawings: Iterable[Drawing]) -> dict[str, str]:
    """Writes every figure as `<name>.svg` and `<name>.pdf`, each whole or not at all.

    Args:
        folder: usually `<run>/figures`; made if missing.
        drawings: with names that differ.

    Returns:
        The SVG texts by name, for the page.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    texts: dict[str, str] = {}
    for drawing in drawings:
        texts[drawing.name] = svg(drawing)
        write_atomically(Path(folder) / f"{drawing.name}.svg", texts[drawing.name])
        write_atomically(Path(folder) / f"{drawing.name}.pdf", pdf(drawing))
    return texts


def inline(drawing: Drawing, text: str, *, prefix: str, clients: Mapping[str, int]) -> str:
    """An SVG text as an element of the page: in its colours, with ids of its own, and marks that know their clients.

    Args:
        drawing: what is shown; its `alt` becomes the element's label.
        text: of `svg`.
        prefix: of ids, different for each figure of a page.
        clients: the numbers that the page's script knows clients by; a mark of another one stays silent.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE.*?>", "", text, flags=re.DOTALL))
    for child in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(child)
    for group in root.iter(f"{{{_SVG}}}g"):
        if group.get("id", "").startswith(_MARKS):
            _name_marks(group, drawing.marks[int(group.attrib["id"][len(_MARKS) :])], clients)
    _keep_used_ids(root, prefix)
    for element in root.iter():
        for key in {"x", "y", "d", "transform"}.intersection(element.keys()):
            element.set(key, re.sub(r"(\d+\.\d\d)\d+", r"\1", element.attrib[key]))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": drawing.alt}
    shown = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in VARIABLES.items():
        shown = re.sub(colour, f"var(--{variable})", shown, flags=re.IGNORECASE)
    return re.sub(r"'DejaVu Sans'.*?sans-serif", "system-ui, sans-serif", shown)


def _name_marks(group: ElementTree.Element, marks: Sequence[Mark], clients: Mapping[str, int]) -> None:
    uses = list(group.iter(f"{{{_SVG}}}use"))
    if uses:
        group.set("style", uses[0].get("style", ""))
        group.set("class", "marks")
    for use, mark in zip(uses, marks, strict=True):
        use.attrib.pop("style", None)
        if mark.client in clients:
            use.set("data-client", str(clients[mark.client]))
            use.set("data-text", mark.text)


def _keep_used_ids(root: ElementTree.Element, prefix: str) -> None:
    """Ids must be unique in a page: those that nothing points to go, the others get a prefix."""
    values = [(element, key, value) for element in root.iter() for key, value in element.attrib.items()]
    used = {found for _, key, value in values if key != "id" for found in re.findall(r"#([\w-]+)", value)}
    for element, key, value in values:
        if key == "id":
            element.attrib.pop("id")
            if value in used:
                element.set("id", f"{prefix}-{value}")
        elif key == _LINK and value.startswith("#"):
            element.set(key, f"#{prefix}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{prefix}-"))
