"""Pictures of what a model computed, drawn from one trace. No global state of pyplot is touched.

Shapes: B rows, T tokens, F frames, N vision tokens per frame, L blocks, G grid side with N = 1 + G * G.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from mmskip.files import whole
from mmskip.trace import ForwardRecord

RAN, SKIPPED, DENSE, INK, LINE = "#2a6f97", "#edf1f4", "#a9bfce", "#22313c", "#c3ccd3"
HIGHLIGHT = "#d1495b"
SERIES = ["#2a6f97", "#c98a1b", "#5f8f4e", "#7b5ea7"]


def kept_tokens(forward: ForwardRecord, row: int = 0) -> np.ndarray:
    """Which vision tokens each block processed.

    Args:
        forward: a record of `mmskip.trace` of a model with token routing, whose frames all have N vision tokens.
        row: of the batch.

    Returns:
        Float array [L, F, N]: 1 processed, 0 skipped, NaN in a block that is not routed (it processes all).

    Raises:
        ValueError: the forward has no layout (nothing routes tokens), or frames of different sizes.
    """
    if forward.layout is None:
        raise ValueError(
            "the trace has no layout: no method routes tokens here; apply one, e.g. mmskip.MoDConfig(keep=0.2)"
        )
    layout = forward.layout[row].cpu().numpy()
    frames, counts = np.unique(layout[layout >= 0], return_counts=True)
    if len(set(counts.tolist())) != 1:
        raise ValueError(f"row {row} needs frames of one size to be drawn, got vision tokens per frame {counts}")
    kept = np.full((len(forward.layers), len(frames), counts[0]), np.nan)
    for index, layer in enumerate(forward.layers):
        if layer.kept is not None:
            kept[index] = layer.kept[row].cpu().numpy()[layout >= 0].reshape(kept.shape[1:])
    return kept


def keep_map(forward: ForwardRecord, row: int = 0, max_frames: int = 24) -> Figure:
    """Heat map over blocks and frames: which vision tokens ran where.

    Each column of a frame is one of its vision tokens, the first one CLS if the tower has it.

    Args:
        forward: see `kept_tokens`.
        row: of the batch.
        max_frames: frames drawn, from the first one.

    Returns:
        A figure; `save_png` writes it.
    """
    kept = kept_tokens(forward, row)[:, :max_frames]
    blocks, frames, tokens = kept.shape
    cells = np.where(np.isnan(kept), 2, kept).reshape(blocks, frames * tokens)
    figure = Figure(figsize=(max(7.0, 0.42 * frames + 1.6), 1.7 + 0.27 * blocks), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        cells, cmap=ListedColormap([SKIPPED, RAN, DENSE]), vmin=0, vmax=2, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks((np.arange(frames) + 0.5) * tokens - 0.5, [str(index) for index in range(frames)])
    axes.set_yticks(range(blocks), [layer.site for layer in forward.layers])
    for edge in range(1, frames):
        axes.axvline(edge * tokens - 0.5, color="white", linewidth=1.2)
    for edge in range(1, blocks):
        axes.axhline(edge - 0.5, color="white", linewidth=1.2)
    axes.set_xlabel(f"frame, {tokens} vision tokens each")
    _quiet(axes)
    axes.tick_params(length=0)
    routed = ~np.isnan(kept).all(axis=(1, 2))
    share = float(np.nanmean(kept[routed])) if routed.any() else 1.0
    axes.set_title(
        f"{int(routed.sum())} of {blocks} blocks are routed and process {share:.0%} of the vision tokens",
        loc="left",
        fontsize=10,
        color=INK,
    )
    for color, label in ((RAN, "processed"), (SKIPPED, "skipped"), (DENSE, "dense block")):
        axes.scatter([], [], marker="s", s=60, color=color, edgecolor=LINE, linewidth=0.5, label=label)
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    return figure


def dropped_patches(frames: np.ndarray, forward: ForwardRecord, row: int = 0, columns: int = 8) -> Figure:
    """The frames themselves: the more routed blocks skip a patch, the more it fades to grey.

    Args:
        frames: uint8 [F, H, W, 3], as the vision tower saw them; the first F frames of the row.
        forward: see `kept_tokens`; N must be G * G, or 1 + G * G with CLS first.
        row: of the batch.
        columns: frames side by side.

    Raises:
        ValueError: N is not a grid.
    """
    kept = kept_tokens(forward, row)
    share = np.nanmean(kept[~np.isnan(kept).all(axis=(1, 2))], axis=0)[: len(frames)]
    frames = frames[: len(share)]
    tokens = share.shape[1]
    side = round(np.sqrt(tokens - 1)) if round(np.sqrt(tokens)) ** 2 != tokens else round(np.sqrt(tokens))
    if tokens not in (side**2, side**2 + 1):
        raise ValueError(f"{tokens} vision tokens per frame are no square grid, with or without CLS")
    grids = share[:, tokens - side**2 :].reshape(-1, side, side)
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    figure = Figure(figsize=(1.45 * columns, 1.62 * rows + 0.35), layout="constrained")
    for index, (frame, grid) in enumerate(zip(frames, grids, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(_faded(frame, grid), interpolation="nearest")
        axes.set_title(str(index), fontsize=7, pad=2, color=INK)
        axes.set_axis_off()
    figure.suptitle("Patches fade with the share of routed blocks that skip them", fontsize=9, color=INK)
    return figure


def _faded(frame: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """`frame` [H, W, 3] with each cell of `grid` [G, G] as vivid as its value in [0, 1]."""
    height, width = frame.shape[:2]
    cells = grid[np.arange(height)[:, None] * grid.shape[0] // height, np.arange(width)[None] * grid.shape[1] // width]
    grey = 0.35 * frame.mean(axis=2, keepdims=True) + 0.65 * 200
    vivid = cells[..., None]
    return (vivid * frame + (1 - vivid) * grey).round().astype(np.uint8)


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
        _quiet(axes)
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
        _quiet(axes)
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
