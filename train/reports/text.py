"""The texts and numbers of a run's report: tables, samples, results on disk."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmskip.datasets.narration.turns import TurnSpan

COLUMNS = (
    ("lm_ppl", "LM-PPL"),
    ("lm_correctness", "LM-Correctness"),
    ("time_diff", "TimeDiff (s)"),
    ("fluency", "Fluency"),
)


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table of the narration metrics, one line per model."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{title:>16}" for _, title in COLUMNS)]
    for name, values in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{values[key]:>16.3f}" for key, _ in COLUMNS))
    return "\n".join(lines)


def narration_lines(
    uid: str, truth: Sequence[TurnSpan], said: Sequence[tuple[int, str]], start_s: float, fps: float
) -> str:
    """The narrations of a model beside the true ones, in the order of time.

    Args:
        uid: name of the sample.
        truth: the sample's turns.
        said: (frame, text) of the model.
        start_s: time of the sample's first frame, seconds.
        fps: frames per second.
    """
    true_by_frame = {turn.frames[1] - 1: turn.narration for turn in truth}
    said_by_frame = dict(said)
    width = max([len(text) for text in true_by_frame.values()] + [5])
    lines = [f"{uid}", f"  {'time':>8}  {'truth':<{width}}  model"]
    for frame in sorted(true_by_frame.keys() | said_by_frame.keys()):
        time_s = start_s + frame / fps
        left, right = true_by_frame.get(frame, ""), said_by_frame.get(frame, "")
        lines.append(f"  {time_s:>6.1f} s  {left:<{width}}  {right}".rstrip())
    return "\n".join(lines)


def savings_lines(label: str, savings: Mapping[str, Any]) -> str:
    """Counted and measured savings in words."""
    step, stream, measured = savings["training_step"], savings.get("streaming"), savings.get("measured")
    lines = [
        f"{label}, against the same model with every token in every block:",
        f"  training step  {_share(step, 'flops')} of the FLOPs, {_share(step, 'activation_bytes')} of the activation "
        f"bytes (counted); ideal speed-up {step['ideal_speedup']:.2f}x",
    ]
    if measured is not None:
        lines.append(
            f"                 {measured['speedup']:.2f}x the speed (measured: median of paired ratios, quartiles "
            f"{measured['low']:.2f} to {measured['high']:.2f}; {1000 * measured['seconds']:.0f} ms against "
            f"{1000 * measured['dense_seconds']:.0f} ms)"
        )
    if stream is not None:
        lines.append(
            f"  streaming      {_share(stream, 'flops')} of the FLOPs, {_share(stream, 'kv_bytes')} of the "
            "KV cache (counted)"
        )
    return "\n".join(lines)


def _share(cost: Mapping[str, Any], key: str) -> str:
    dense = cost[f"dense_{key}"]
    return f"{cost[key] / dense:.0%}" if dense else "none"


def model_label(methods: Sequence[Mapping[str, Any]]) -> str:
    """A short name of a method list: "dense", or for example "MoD keep=0.2 router=random"."""
    parts = []
    for method in methods:
        settings = method.get("init_args", {})
        shown = [f"{key}={settings[key]}" for key in ("keep", "router") if key in settings]
        parts.append(" ".join([method["class_path"].rpartition(".")[2].removesuffix("Config"), *shown]))
    return " + ".join(parts) or "dense"


def task_id(samples: Iterable[Any]) -> str:
    """A name of the evaluated samples: equal ids, equal samples, so that results can be compared. It depends on frames,
    texts and times of the samples (uid, turns), not on how a model lays them out in tokens."""
    described = [(uid, [(turn.frames, turn.narration, turn.time_s) for turn in turns]) for uid, turns in samples]
    return hashlib.sha256("\n".join(sorted(map(repr, described))).encode()).hexdigest()[:16]


def comparable_points(own: Mapping[str, Any], own_folder: Path, runs: Path) -> list[dict[str, Any]]:
    """Points for `mmskip.viz.quality_against_compute`: this run, and the newest other run of each name under `runs`
    that was evaluated on the same samples.

    Args:
        own: the results of this run, see `mmskip.train.reports.narration.NarrationReport`.
        own_folder: its folder; an earlier file there is left out.
        runs: folder of `<name>/<time>/results.json`.
    """
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(runs.glob("*/*/results.json"), key=lambda path: path.stat().st_mtime):
        results = json.loads(path.read_text())
        # runs of other modules (tuned VLMs, captioners) report other things
        same = results.get("task") == own["task"] and results.get("stage") == own["stage"]
        if same and path.parent != own_folder and results["name"] != own["name"]:
            newest[results["name"]] = results
    points = [*map(_point, newest.values()), {**_point(own), "highlight": True}]
    # a hopeless model has an infinite perplexity, which a file holds as null
    return [point for point in points if point["value"] is not None and math.isfinite(point["value"])]


def _point(results: Mapping[str, Any]) -> dict[str, Any]:
    step, measured = results["savings"]["training_step"], results["savings"].get("measured")
    if not results["methods"]:
        measured = {"speedup": 1.0}  # the dense model is what the others are measured against
    return {
        "label": f"{results['name']} ({results['label']})",
        "value": results["metrics"]["model"]["lm_ppl"],
        "counted": step["flops"] / step["dense_flops"],
        "measured": None if measured is None else 1 / measured["speedup"],
    }
