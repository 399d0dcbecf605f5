"""How every figure looks: quiet axes, and colours that colour-blind readers tell apart (Okabe and Ito).

A page follows the reader's choice of light or dark. Every colour is drawn as a CSS variable with two values, in the
page and in the pictures alike.
"""

import base64
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from natgrad_lab.report.markup import Markup, void

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#8C6D00")
INK, FAINT = "#222222", "#D9D9D9"

STAGES = {
    "data": "#D9D9D9",
    "network": "#0072B2",
    "measure": "#E69F00",
    "checksum": "#F3D58B",
    "messages": "#CC79A7",
    "factor": "#D55E00",
    "precondition": "#009E73",
    "update": "#999999",
    "other": "#444444",
}
"""A colour for each stage: blue is the network, warm is curvature, grey is the rest."""

DARK = {
    "#222222": "#E2E2E2",
    "#444444": "#C4C4C4",
    "#555555": "#ABABAB",
    "#777777": "#999999",
    "#888888": "#7D7D7D",
    "#999999": "#8F8F8F",
    "#B0B0B0": "#6F6F6F",
    "#BBBBBB": "#8A8A8A",
    "#CCCCCC": "#4A4A4A",
    "#D9D9D9": "#6A6A6A",
    "#E6E6E6": "#343434",
    "#FFFFFF": "#1D1E20",
    "#7A7A7A": "#A3A3A3",
    "#0072B2": "#3F9FE3",
    "#D55E00": "#FF8438",
    "#009E73": "#27BE92",
    "#CC79A7": "#E19AC4",
    "#E69F00": "#F2B13A",
    "#56B4E9": "#9BD5F6",
    "#8C6D00": "#C9A526",
    "#08519C": "#4F94E8",
    "#3182BD": "#7CB9EA",
    "#6BAED6": "#B3DAF3",
    "#006D2C": "#35B765",
    "#41AB5D": "#7BD796",
    "#A1D99B": "#C3EBBE",
    "#B2182B": "#F0616D",
    "#762A83": "#BC84CB",
}
"""What a colour is on a dark page; others are the same on both."""

LOOK: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a run's name may hold dollars
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "svg.fonttype": "path",
    "svg.hashsalt": "natgrad",
}


@contextmanager
def look() -> Iterator[None]:
    """Draw what is inside in the report's style, without a display, whatever a matplotlibrc of the folder says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(LOOK)
        yield


def variable(colour: str) -> str:
    """Return a colour as CSS: a variable where it is another on a dark page."""
    return f"var(--x{colour[1:].lower()})" if colour.upper() in DARK else colour


def palette(colours: Iterable[str] = DARK) -> str:
    """Return the CSS that gives colours their light and dark values."""
    names = {f"--x{colour[1:].lower()}": colour for colour in colours}
    light = "".join(f"{name}:{colour};" for name, colour in names.items())
    dark = "".join(f"{name}:{DARK[colour]};" for name, colour in names.items())
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def picture(figure: Figure, alternative: str) -> Markup:
    """Return a figure as an HTML image that needs no file."""
    buffer = io.BytesIO()
    metadata: Any = {"Date": None}
    figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    data = base64.b64encode(themed(buffer.getvalue().decode()).encode()).decode()
    return void("img", alt=alternative, src=Markup(f"data:image/svg+xml;base64,{data}"))


def themed(svg: str) -> str:
    """Return a drawing that turns dark with the page."""
    found: dict[str, None] = {}

    def swap(match: re.Match[str]) -> str:
        colour = match[0].upper()
        if colour not in DARK:
            return match[0]
        found[colour] = None
        return variable(colour)

    svg = re.sub(r"(?<=: )#[0-9a-fA-F]{6}\b", swap, svg)
    at = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:at]}<style>{palette(found)}</style>{svg[at:]}"
