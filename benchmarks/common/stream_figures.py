"""The figures and pictures of the streaming benchmark, from the times that it measured."""

import statistics
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from mmskip.viz.figure import HIGHLIGHT, INK, LINE, RAN

SPANS = ((500, 600), (2000, 2100))


def spans(frames: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Early and late frames to be compared: those of the claim, or the same shares of a shorter stream."""
    if frames >= SPANS[1][1]:
        return SPANS
    part = max(frames // 21, 1)
    return (5 * part, 6 * part), (20 * part, 21 * part)


def read_position(rows: dict[str, dict[str, Any]], frames: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The claims about position, with figures thinned out for the result file."""
    early, late = spans(frames)
    found: dict[str, Any] = {"frames": frames, "early": early, "late": late, "contenders": {}}
    size = max(frames // 60, 1)
    for name, row in rows.items():
        timed = [
            [1000 * seconds for frame, seconds in row["latency_s"].items() if begin <= frame < end]
            for begin, end in (early, late)
        ]
        first, last = map(statistics.median, timed)
        end_bytes = row["kv_bytes"][frames - 1]
        found["contenders"][name] = {
            "early_ms": round(first, 3),
            "late_ms": round(last, 3),
            "frames_timed": [len(part) for part in timed],
            "late_over_early": round(last / first, 4),
            "frames_per_second_late": round(1000 / last, 2),
            "kv_bytes_end": end_bytes,
            "kv_bound_bytes": row["kv_bound_bytes"],
            "most_reserved_bytes": row["most_reserved_bytes"],
            "latency_ms_by_position": _binned(row["latency_s"], size, 1000),
            "kv_bytes_by_position": _binned(row["kv_bytes"], size, 1),
        }
        say(
            f"  {name:15s} frames {early[0]}-{early[1]} {first:.2f} ms, {late[0]}-{late[1]} {last:.2f} ms "
            f"({last / first:.2f}x), {1000 / last:.1f} frames/s, {end_bytes / 2**20:.2f} MiB at the end"
        )
    by_name = found["contenders"]
    found["kv_share"] = round(by_name["mod"]["kv_bytes_end"] / by_name["dense"]["kv_bytes_end"], 4)
    found["window_late_over_early"] = by_name["mod + window"]["late_over_early"]
    # of frame-by-frame watching at the end of the stream, without a window
    found["speedup"] = round(by_name["dense"]["late_ms"] / by_name["mod"]["late_ms"], 4)
    found["ideal"] = round(rows["mod"]["ideal"], 4)
    say(
        f"  without a window MoD takes {found['kv_share']:.3f} of dense's KV bytes (at most 0.65 wanted); with one its "
        f"late frames take {found['window_late_over_early']:.3f} of its early ones (at most 1.15 wanted)"
    )
    return found


def _binned(values: dict[int, float], size: int, scale: float) -> list[tuple[int, float]]:
    """Medians of `size` frames each, with the first of these frames."""
    parts: dict[int, list[float]] = {}
    for frame, value in values.items():
        parts.setdefault(frame // size * size, []).append(value)
    return [(start, round(scale * statistics.median(part), 3)) for start, part in sorted(parts.items())]


def verdict(cells: Sequence[dict[str, Any]]) -> str:
    """Say in words in which cells MoD does not pay."""
    losing = [c for c in cells if c["speedup"] < 1.05]
    if not losing:
        return f"MoD is at least 1.05x faster in all {len(cells)} cells of the grid."
    named = ", ".join(f"{c['tokens']}x{c['chunk']}x{c['streams']} ({c['speedup']:.2f}x)" for c in losing)
    return (
        f"MoD does not pay (less than 1.05x) in {len(losing)} of {len(cells)} cells, "
        f"tokens x frames a call x streams: {named}."
    )


def picture(result: dict[str, Any]) -> Figure:
    """Draw the measurements: latency and KV bytes against position, and the grid."""
    cells, contenders = result.get("grid", {}).get("cells", []), result.get("position", {}).get("contenders", {})
    count = 2 * bool(contenders) + bool(cells)
    figure = Figure(figsize=(4.35 * max(count, 1), 3.8), layout="constrained")
    panels: Any = figure.subplots(1, max(count, 1), squeeze=False)[0]
    if contenders:
        _draw_position(panels, contenders)
    if cells:
        _draw_grid(panels[-1], cells)
    for axes in panels:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(LINE)
        axes.tick_params(labelsize=8)
    return figure


def _draw_position(panels: Any, contenders: dict[str, dict[str, Any]]) -> None:
    styles = {"dense": (INK, "-"), "mod": (RAN, "-"), "dense + window": (INK, "--"), "mod + window": (RAN, "--")}
    for name, row in contenders.items():
        color, line = styles[name]
        for axes, key, scale in ((panels[0], "latency_ms_by_position", 1), (panels[1], "kv_bytes_by_position", 2**20)):
            places, values = zip(*((frame, value / scale) for frame, value in row[key]), strict=True)
            axes.plot(places, values, line, color=color, label=name, linewidth=1.5)
    for axes, label in ((panels[0], "latency of a frame, ms (median)"), (panels[1], "keys and values, MiB")):
        axes.set(xlabel="frames watched", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)


def _draw_grid(axes: Any, cells: Sequence[dict[str, Any]]) -> None:
    marks = dict(zip(sorted({cell["streams"] for cell in cells}), cycle("os^Dv*"), strict=False))
    for cell in cells:
        color = HIGHLIGHT if cell["speedup"] < 1.05 else RAN
        axes.plot(cell["tokens"] * cell["chunk"], cell["speedup"], marks[cell["streams"]], color=color, markersize=5)
    axes.axhline(1, color=LINE, linewidth=1)
    axes.set(xscale="log", xlabel="vision tokens of a stream in a call", ylabel="MoD over dense, frames per second")
    for streams, mark in marks.items():
        axes.plot([], [], mark, color=RAN, markersize=5, label=f"{streams} stream{'s' * (streams > 1)}")
    if cells:
        axes.legend(frameon=False, fontsize=8)
