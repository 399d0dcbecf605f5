"""How every figure looks: quiet axes, and colours that colour-blind readers tell apart (Okabe and Ito)."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

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

LOOK: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
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
    """Draw what is inside in the report's style, without a display."""
    with mpl.rc_context(LOOK):
        yield


def picture(figure: Figure, alternative: str) -> str:
    """Return a figure as an HTML image that needs no file."""
    buffer = io.BytesIO()
    metadata: Any = {"Date": None}
    figure.savefig(buffer, format="svg", metadata=metadata)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{alternative}" src="data:image/svg+xml;base64,{data}">'
