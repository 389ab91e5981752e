"""Streams of a routed video LLM against the dense one: latency, frames per second, KV bytes, and prefill.

    python benchmarks/streaming.py                        all parts at the shape of the claim
    python benchmarks/streaming.py --parts position       latency and KV bytes against the position in the stream
    python benchmarks/streaming.py --shape tiny --frames 130 --pairs 2      a quick look

Random weights that never speak, random features: the language model alone is timed, not the vision tower. Contenders
run frame by frame in turns, so that drift of the machine hits all alike. Parts:
  position  one stream, one frame per call: dense, MoD, dense + window and MoD + window, from the first frame on
  grid      MoD against dense at 1 to 64 tokens per frame, 1 to 8 frames per call, 1 to 8 streams
  prefill   600 frames x 10 tokens (and a separator each) in one call, against dense and the counted ideal
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, emit, interleaved_ratio, summary
from matplotlib.figure import Figure

import mmskip
from mmskip.models.narrator import TokenIds
from mmskip.models.stream import StreamEngine, StreamSettings
from mmskip.models.video_llm import VideoLLM
from mmskip.viz import HIGHLIGHT, INK, LINE, RAN, save_png

FEATURES = 64
MOD = mmskip.MoDConfig(keep=0.2, layers="alternate", gate="tanh")
WINDOW_FRAMES, SINKS = 200, 8
SPANS = ((500, 600), (2000, 2100))
TOKENS, CHUNKS, STREAMS = (1, 4, 10, 32, 64), (1, 2, 4, 8), (1, 2, 4, 8)


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    layers: int = 8
    width: int = 512
    ffn: int = 1376
    heads: int = 8
    kv_heads: int = 8
    vocab: int = 1000
    dtype: str = "float32"


SHAPES = {
    "claim": Shape(),
    "tiny": Shape(4, 64, 128, 4, 2, 100),
    "llama8b_8layers": Shape(8, 4096, 14336, 32, 8, 128256, "bfloat16"),
}


def build(shape: Shape, methods: Sequence[mmskip.MoDConfig], device: str) -> VideoLLM:
    """A model that stays silent: its logits are all zero, and the first of equal ones is the silent token."""
    torch.manual_seed(0)
    llm = {
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 2**20,
    }
    ids = TokenIds(0, 1, 2, (3,), (4,), shape.vocab)
    with torch.device(device):
        model = VideoLLM(
            llm, methods=list(methods), llm_dtype=shape.dtype, feature_dim=FEATURES, fps=2.0, tokens=ids.to_dict()
        )
    with torch.no_grad():
        model.llm.lm_head.weight.zero_()
    return model.to(device).eval()


class Contender:
    """A model watching streams that go on for ever."""

    def __init__(self, model: VideoLLM, tokens: int = 10, chunk: int = 1, streams: int = 1, window: int | None = None):
        settings = StreamSettings(
            window=window, sinks=SINKS if window else 0, chunk=chunk, threshold=0.0, max_new_tokens=1
        )
        self.engine = StreamEngine(model, tokens, settings, [[3]] * streams)
        self.device = model.device

    def watch(self, frames: int) -> float:
        """Seconds for `frames` more frames of every stream."""
        features = torch.randn(frames, self.engine.frame_tokens, FEATURES, device=self.device)
        for number in range(len(self.engine.frames_seen)):
            self.engine.push(features, number)
        _wait(self.device)
        start = time.perf_counter()
        said = self.engine.run()
        _wait(self.device)
        if said:
            raise RuntimeError("a model that should be silent spoke; its figures would mean nothing")
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def position(models: dict[str, VideoLLM], frames: int, window: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Latency of every frame and KV bytes behind it, per contender; and what the window was announced to take."""
    plan = {"dense": ("dense", None), "mod": ("mod", None), "dense + window": ("dense", window)}
    plan["mod + window"] = ("mod", window)
    running = {name: Contender(models[model], window=limit) for name, (model, limit) in plan.items()}
    for name, contender in running.items():
        if (limit := contender.engine.kv_bound()) is not None:
            say(f"  {name}: keys and values will take at most {limit / 2**20:.2f} MiB")
    rows: dict[str, dict[str, Any]] = {
        name: {"latency_s": [], "kv_bytes": [], "most_reserved_bytes": 0} for name in running
    }
    for _ in range(frames):
        for name, contender in running.items():
            row, cache = rows[name], contender.engine.cache
            row["latency_s"].append(contender.watch(1))
            row["kv_bytes"].append(cache.stored_bytes)
            row["most_reserved_bytes"] = max(row["most_reserved_bytes"], cache.reserved_bytes)
    for name, row in rows.items():
        limit = running[name].engine.kv_bound()
        if limit is not None and row["most_reserved_bytes"] > limit:
            raise RuntimeError(f"{name} took {row['most_reserved_bytes']} bytes, more than the {limit} announced")
        row["kv_bound_bytes"] = limit
    return rows


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
    for name, row in rows.items():
        first, last = (1000 * statistics.median(row["latency_s"][slice(*span)]) for span in (early, late))
        every = max(frames // 60, 1)
        found["contenders"][name] = {
            "early_ms": round(first, 3),
            "late_ms": round(last, 3),
            "late_over_early": round(last / first, 4),
            "frames_per_second_late": round(1000 / last, 2),
            "kv_bytes_end": row["kv_bytes"][-1],
            "kv_bound_bytes": row["kv_bound_bytes"],
            "most_reserved_bytes": row["most_reserved_bytes"],
            "latency_ms_by_position": _binned(row["latency_s"], every, 1000),
            "kv_bytes_by_position": row["kv_bytes"][::every],
        }
        say(
            f"  {name:15s} frames {early[0]}-{early[1]} {first:.2f} ms, {late[0]}-{late[1]} {last:.2f} ms "
            f"({last / first:.2f}x), {1000 / last:.1f} frames/s, {row['kv_bytes'][-1] / 2**20:.2f} MiB at the end"
        )
    ends = {name: row["kv_bytes"][-1] for name, row in rows.items()}
    found["kv_share"] = round(ends["mod"] / ends["dense"], 4)
    found["window_late_over_early"] = found["contenders"]["mod + window"]["late_over_early"]
    say(f"  KV bytes of MoD: {found['kv_share']:.3f} of dense; latency under the window: late / early above")
    return found


def _binned(values: Sequence[float], size: int, scale: float) -> list[float]:
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [round(scale * statistics.median(part), 3) for part in parts]


def grid(
    models: dict[str, VideoLLM],
    sizes: tuple[Sequence[int], Sequence[int], Sequence[int]],
    warm: int,
    repeats: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Frames per second of dense and MoD at `warm` frames into the stream, for each (tokens, chunk, streams)."""
    cells = []
    for tokens, chunk, streams in product(*sizes):
        pair = {name: Contender(model, tokens, chunk, streams) for name, model in models.items()}
        costs = {}
        for name, contender in pair.items():
            contender.watch(warm)
            with mmskip.trace(models[name].llm) as trace:
                contender.watch(chunk)
            costs[name] = mmskip.cost(models[name].llm, trace)
        times: dict[str, list[float]] = {name: [] for name in pair}
        for index in range(repeats):
            order = list(pair.items())[:: 1 if index % 2 == 0 else -1]
            for name, contender in order:
                times[name].append(contender.watch(chunk))
        ratios = [dense / mod for dense, mod in zip(times["dense"], times["mod"], strict=True)]
        cell = {
            "tokens": tokens,
            "chunk": chunk,
            "streams": streams,
            "speedup": round(statistics.median(ratios), 3),
            "ideal": round(costs["mod"].ideal_speedup, 3),
            **{
                f"{name}_frames_per_second": round(chunk * streams / statistics.median(seconds), 2)
                for name, seconds in times.items()
            },
            **{f"{name}_kv_bytes": pair[name].engine.cache.stored_bytes for name in pair},
        }
        cells.append(cell)
        say(
            f"  {tokens:2d} tokens, {chunk} frames a call, {streams} streams: {cell['speedup']:.2f}x "
            f"(counted {cell['ideal']:.2f}x), {cell['mod_frames_per_second']:.1f} frames/s"
        )
    return cells


def verdict(cells: Sequence[dict[str, Any]]) -> str:
    """Where MoD does not pay, in words."""
    losing = [c for c in cells if c["speedup"] < 1.05]
    if not losing:
        return f"MoD is at least 1.05x faster in all {len(cells)} cells of the grid."
    named = ", ".join(f"{c['tokens']}x{c['chunk']}x{c['streams']} ({c['speedup']:.2f}x)" for c in losing)
    return (
        f"MoD does not pay (less than 1.05x) in {len(losing)} of {len(cells)} cells, "
        f"tokens x frames a call x streams: {named}."
    )


def prefill(models: dict[str, VideoLLM], frames: int, pairs: int) -> dict[str, Any]:
    """One call with `frames` frames of 10 tokens: MoD against dense, beside the counted ideal."""

    def run(name: str) -> None:
        Contender(models[name], chunk=frames).watch(frames)

    with mmskip.trace(models["mod"].llm) as trace:
        run("mod")
    ideal = mmskip.cost(models["mod"].llm, trace).ideal_speedup
    ratio = interleaved_ratio(lambda: run("dense"), lambda: run("mod"), pairs)
    return {"frames": frames, **summary(ratio, ideal)}


def picture(result: dict[str, Any]) -> Figure:
    """Latency and KV bytes against position, and the grid."""
    figure = Figure(figsize=(13.0, 3.8), layout="constrained")
    panels: Any = figure.subplots(1, 3)
    styles = {"dense": (INK, "-"), "mod": (RAN, "-"), "dense + window": (INK, "--"), "mod + window": (RAN, "--")}
    for name, row in result.get("position", {}).get("contenders", {}).items():
        color, line = styles[name]
        for axes, key, scale in ((panels[0], "latency_ms_by_position", 1), (panels[1], "kv_bytes_by_position", 2**20)):
            values = [value / scale for value in row[key]]
            places = [index * result["position"]["frames"] / len(values) for index in range(len(values))]
            axes.plot(places, values, line, color=color, label=name, linewidth=1.5)
    for axes, label in ((panels[0], "latency of a frame, ms (median)"), (panels[1], "keys and values, MiB")):
        axes.set(xlabel="frames watched", ylabel=label)
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    _draw_grid(panels[2], result.get("grid", []))
    for axes in panels:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(LINE)
        axes.tick_params(labelsize=8)
    return figure


def _draw_grid(axes: Any, cells: Sequence[dict[str, Any]]) -> None:
    marks = dict(zip(STREAMS, "os^D", strict=True))
    for cell in cells:
        color = HIGHLIGHT if cell["speedup"] < 1.05 else RAN
        axes.plot(cell["tokens"] * cell["chunk"], cell["speedup"], marks[cell["streams"]], color=color, markersize=5)
    axes.axhline(1, color=LINE, linewidth=1)
    axes.set(xscale="log", xlabel="vision tokens of a stream in a call", ylabel="MoD over dense, frames per second")
    for streams, mark in marks.items():
        if any(cell["streams"] == streams for cell in cells):
            axes.plot([], [], mark, color=RAN, markersize=5, label=f"{streams} stream{'s' * (streams > 1)}")
    if cells:
        axes.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="claim", choices=SHAPES)
    add("--parts", nargs="+", default=["position", "grid", "prefill"], choices=["position", "grid", "prefill"])
    add("--frames", type=int, default=2100, help="length of the streams of `position`")
    add("--prefill_frames", type=int, default=600)
    add("--pairs", type=int, default=15, help="paired runs of `prefill`, and repeats of a cell of `grid`")
    add("--tokens", type=int, nargs="+", default=list(TOKENS), help="per frame, in `grid`")
    add("--chunks", type=int, nargs="+", default=list(CHUNKS), help="frames per call, in `grid`")
    add("--streams", type=int, nargs="+", default=list(STREAMS), choices=STREAMS, help="in `grid`")
    add("--warm", type=int, default=32, help="frames before a cell of `grid` is timed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="result file (default: benchmarks/results/streaming_DEVICE_SHAPE.json)")
    args = parser.parse_args()
    if args.frames < 21:
        parser.error(f"--frames is {args.frames}; expected at least 21")
    models = {
        "dense": build(SHAPES[args.shape], (), args.device),
        "mod": build(SHAPES[args.shape], (MOD,), args.device),
    }
    result: dict[str, Any] = {"name": "streaming", "shape": args.shape, "model": asdict(SHAPES[args.shape])}
    if "position" in args.parts:
        window = min(WINDOW_FRAMES, args.frames // 6) * 11
        print(f"position: {args.frames} frames of 10 tokens, window {window} tokens")
        result["position"] = read_position(position(models, args.frames, window, print), args.frames, print)
    if "grid" in args.parts:
        print("grid: tokens per frame, frames per call, streams")
        result["grid"] = grid(models, (args.tokens, args.chunks, args.streams), args.warm, args.pairs, print)
        result["verdict"] = verdict(result["grid"])
        print(result["verdict"])
    if "prefill" in args.parts:
        print(f"prefill: {args.prefill_frames} frames of 10 tokens in one call")
        result["prefill"] = prefill(models, args.prefill_frames, args.pairs)
        print(f"  {result['prefill']}")
    measured = result.get("prefill") or next(iter(result.get("grid", [])), None)
    result |= {"speedup": measured["speedup"] if measured else 1.0, "ideal": measured["ideal"] if measured else 1.0}
    path = Path(args.out or RESULTS / f"streaming_{args.device}_{args.shape}.json")
    save_png(picture(result), path.with_suffix(".png"))
    emit(result, path)


if __name__ == "__main__":
    main()
