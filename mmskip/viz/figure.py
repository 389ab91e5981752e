"""Colours, axes and files that all figures share. No global state of pyplot is touched."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmskip.utils.files import atomic_path

RAN, SKIPPED, DENSE, INK, LINE = "#2a6f97", "#edf1f4", "#a9bfce", "#22313c", "#c3ccd3"
HIGHLIGHT = "#d1495b"
SERIES = ["#2a6f97", "#c98a1b", "#5f8f4e", "#7b5ea7"]


def subplots(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """Make a figure of `width` x `height` inches with an array [rows, columns] of axes."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def style_axes(axes: Any) -> None:
    """Draw axes in the quiet style of the reports."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set(color=INK, size=9)
    axes.yaxis.label.set(color=INK, size=9)


def save_png(figure: Figure, path: str | Path, dpi: int | None = 150) -> Path:
    """Write a figure as PNG, atomically; folders are made. Return the path."""
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi or figure.dpi, facecolor="white")
    return Path(path)
