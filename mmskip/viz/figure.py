"""What every figure shares."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmskip.utils.files import whole

HIGHLIGHT = "#d1495b"


SERIES = ["#2a6f97", "#c98a1b", "#5f8f4e", "#7b5ea7"]

RAN, SKIPPED, DENSE, INK, LINE = "#2a6f97", "#edf1f4", "#a9bfce", "#22313c", "#c3ccd3"


def _quiet(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set(color=INK, size=9)
    axes.yaxis.label.set(color=INK, size=9)


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all; folders are made. Returns the path."""
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150, facecolor="white")
    return Path(path)
