"""Quality against compute, and exit depths."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mmskip.viz.figure import HIGHLIGHT, INK, LINE, RAN, SERIES, style_axes


def quality_against_compute(
    points: Sequence[Mapping[str, Any]], metric: str = "LM-PPL", lower_is_better: bool = True, note: str = ""
) -> Figure:
    """One point per model: its quality over its compute, counted beside measured.

    Args:
        points: dicts with `label`, `value` (the metric), `counted` (FLOPs, as a share of the dense model's),
            `measured` (time of a step as a share of the dense model's; None where it was not measured), and
            optionally `highlight` and `series` (points of one series are joined, and named by a legend instead of their
            labels).
        metric: name on the axis.
        lower_is_better: of the metric.
        note: text above the panels.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("quality_against_compute needs at least one point, got none")
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    spread = max(point["value"] for point in points) - min(point["value"] for point in points)
    names = (("counted", "counted FLOPs, share of dense"), ("measured", "measured time of a step, share of dense"))
    for axes, (key, label) in zip(panels, names, strict=True):
        shown = [point for point in points if point.get(key) is not None]
        alone = [point for point in shown if not point.get("series")]
        for point in alone:
            color = HIGHLIGHT if point.get("highlight") else RAN
            axes.scatter(point[key], point["value"], s=52, color=color, zorder=3, edgecolor="white", linewidth=0.8)
        _draw_series(axes, [point for point in shown if point.get("series")], key)
        _label_points(axes, [(point[key], point["value"], point["label"]) for point in alone], spread)
        axes.set_xlim(0, max([1.0, *(point[key] for point in shown)]) * 1.25)
        axes.axvline(1, color=LINE, linewidth=1, linestyle=":")
        axes.set_xlabel(label)
        axes.grid(color="#e8ecef", linewidth=0.7)
        axes.margins(y=0.18)
        style_axes(axes)
    panels[0].set_ylabel(f"{metric} ({'lower' if lower_is_better else 'higher'} is better)")
    if note:
        figure.suptitle(note, fontsize=9, color=INK)
    return figure


def exit_depths(histograms: Mapping[str, Mapping[str, Sequence[int]]], note: str = "") -> Figure:
    """At which layer states left a model: one panel per part, right and wrong answers apart.

    Args:
        histograms: part of the model -> "right" and "wrong" -> how many states each layer, from the first, was the last
            one for.
        note: text above the panels.

    Raises:
        ValueError: no parts.
    """
    if not histograms:
        raise ValueError("exit_depths needs at least one histogram, got none")
    figure = Figure(figsize=(3.1 * len(histograms) + 0.6, 2.9), layout="constrained")
    panels: Any = figure.subplots(1, len(histograms), squeeze=False)[0]
    for axes, (part, counts) in zip(panels, histograms.items(), strict=True):
        layers = np.arange(1, max(map(len, counts.values())) + 1)
        for place, (name, color) in enumerate((("right", RAN), ("wrong", HIGHLIGHT))):
            values = np.array(counts[name], dtype=float)
            share = values / values.sum() if values.sum() else values
            axes.bar(layers + 0.38 * (place - 0.5), share, 0.36, color=color, label=f"{name} ({values.sum():.0f})")
        axes.set_xticks(layers)
        axes.set_title(part, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("last layer that ran")
        axes.legend(fontsize=7, frameon=False)
        style_axes(axes)
    panels[0].set_ylabel("share of states")
    if note:
        figure.suptitle(note, fontsize=9, color=INK)
    return figure


def _draw_series(axes: Any, points: Sequence[Mapping[str, Any]], key: str) -> None:
    """The points of each series, joined in the order of counted compute, and their legend."""
    colors = iter(SERIES * len(points))
    for name in dict.fromkeys(point["series"] for point in points):
        series = [point for point in points if point["series"] == name]
        color = HIGHLIGHT if any(point.get("highlight") for point in series) else next(colors)
        line = [(point[key], point["value"]) for point in sorted(series, key=lambda point: point["counted"])]
        axes.plot([x for x, _ in line], [y for _, y in line], "o-", color=color, linewidth=1, markersize=5, label=name)
    if points:
        axes.legend(fontsize=8, frameon=False)


def _label_points(axes: Any, points: Sequence[tuple[float, float, str]], spread: float) -> None:
    """Write each label beside its point, and further below, with a line to it, where that of another point is in the
    way; `spread` is that of the values that the axis shows."""
    row = 0.085 * (spread or 1.0)  # a line of text: 13.5 points on an axis of some 215 for 1.36 times the spread
    placed: list[tuple[float, float]] = []
    for x, y, label in sorted(points, key=lambda point: -point[1]):
        above = [at for other, at in placed if abs(x - other) < 0.25]
        at = min([y, *(other - row for other in above)])
        placed.append((x, at))
        moved = at < y
        line = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkB": 4} if moved else None
        offset = (22 if moved else 8, -3 - 13.5 * (y - at) / row)
        axes.annotate(label, (x, y), xytext=offset, textcoords="offset points", fontsize=8, color=INK, arrowprops=line)
