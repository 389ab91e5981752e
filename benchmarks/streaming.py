"""Streams of a routed video LLM against the dense one: latency, frames per second, KV bytes, and prefill.

    python benchmarks/streaming.py                        all parts at the shape of the claim
    python benchmarks/streaming.py --parts position       latency and KV bytes against the position in the stream
    python benchmarks/streaming.py --shape tiny --frames 130 --pairs 2      a quick look

Random weights that never speak, random features: the language model alone is timed, not the vision tower. Contenders
run frame by frame in turns, so that drift of the machine hits all alike. Parts:
  position  one stream, one frame per call: dense + window and MoD + window at every frame, dense and MoD without a
            window at 10 frames each of some 16 positions (between them their cache is filled many frames at a time)
  flat      MoD + window once more, frames 500-600 and 2000-2100 in turns (two streams), so that what the machine does
            meanwhile is not taken for growth
  prefill   600 frames x 10 tokens (and a separator each) in one call, against dense and the counted ideal
  grid      MoD against dense at 1 to 64 tokens per frame, 1 to 8 frames per call, 1 to 8 streams

`--clock cpu` counts the seconds that this process computes, over its threads: for a machine on which others work too,
with OMP_NUM_THREADS=1. `prefill` always takes the time that passes.
Each part, and each cell of the grid, is written when it is measured, and read again unless `--fresh` is given.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

import mmskip
from common.measure import LLAMA_8B, RESULTS, Decoder, emit, environment, interleaved_ratio, summary
from common.stream_figures import picture, read_position, spans, verdict
from mmskip.models.video_llm.module import VideoLLM
from mmskip.models.video_llm.speaking import TokenIds
from mmskip.models.video_llm.streaming.engine import StreamEngine, StreamSettings
from mmskip.utils.command import CommandParser
from mmskip.utils.files import write_json
from mmskip.viz.figure import save_png

FEATURES = 64
MOD = mmskip.MoDConfig(keep=0.2, layers="alternate", gate="tanh")
WINDOW_FRAMES, SINKS = 200, 8
TOKENS, CHUNKS, STREAMS = (1, 10, 64), (1, 2, 8), (1, 2, 8)
PROBES, PROBE_FRAMES = 14, 10
FILL = 50  # frames per call where nothing is timed
LEAD_IN = 120  # single frames before the timed ones of `flat`: by then the buffers are those of single frames

SHAPES = {
    "claim": Decoder(),
    "tiny": Decoder(4, 64, 128, 4, 2, 100),
    "llama8b_8layers": replace(LLAMA_8B, layers=8),
}


def build(shape: Decoder, methods: Sequence[mmskip.MoDConfig], device: str) -> VideoLLM:
    """A model that stays silent: its logits are all zero, and the first of equal ones is the silent token."""
    torch.manual_seed(0)
    llm = {"model_type": "llama", **shape.settings(2**20)}
    ids = TokenIds(0, 1, 2, (3,), (4,), shape.vocab)
    with torch.device(device):
        model = VideoLLM(
            llm, methods=list(methods), llm_dtype=shape.dtype, feature_dim=FEATURES, fps=2.0, tokens=ids.to_dict()
        )
    with torch.no_grad():
        model.llm.lm_head.weight.zero_()
    return model.to(device).eval()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Contender:
    """A model watching endless streams."""

    clock = staticmethod(CLOCKS["wall"])

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
        start = self.clock()
        said = self.engine.run()
        _wait(self.device)
        if said:
            raise RuntimeError("a model that should be silent spoke; its figures would mean nothing")
        return self.clock() - start

    @property
    def seen(self) -> int:
        """Frames that every stream has watched."""
        return min(self.engine.frames_seen)

    def fill(self, until: int) -> None:
        """Watch up to frame `until`, untimed and many frames at a time."""
        if until <= self.seen:
            return
        own = self.engine.settings
        self.engine.settings = replace(own, chunk=FILL)
        self.watch(until - self.seen)
        self.engine.settings = own


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def probed(frames: int) -> set[int]:
    """The frames at which the contenders without a window are timed: `PROBE_FRAMES` at each of `PROBES` positions, in
    the middle of the early frames and at the end of the late ones."""
    early, late = spans(frames)
    size = min(PROBE_FRAMES, early[1] - early[0])
    starts = {round(index * (frames - size) / (PROBES - 1)) for index in range(PROBES)}
    starts |= {(sum(early) - size) // 2, late[1] - size}
    return {start + index for start in starts for index in range(size)}


def position(models: dict[str, VideoLLM], frames: int, window: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Latency and KV bytes by frame, per contender; and the announced bytes of the window."""
    plan = {"dense": ("dense", None), "mod": ("mod", None), "dense + window": ("dense", window)}
    plan["mod + window"] = ("mod", window)
    running = {name: Contender(models[model], window=limit) for name, (model, limit) in plan.items()}
    limits = {name: contender.engine.kv_bound() for name, contender in running.items()}
    for name, limit in limits.items():
        if limit is not None:
            say(f"  {name}: keys and values will take at most {limit / 2**20:.2f} MiB")
    rows: dict[str, dict[str, Any]] = {
        name: {"latency_s": {}, "kv_bytes": {}, "most_reserved_bytes": 0, "kv_bound_bytes": limit}
        for name, limit in limits.items()
    }
    chosen, begin = probed(frames), time.perf_counter()
    for frame in range(frames):
        for name, contender in running.items():
            if limits[name] is None and frame not in chosen:
                continue
            if contender.seen < frame:
                contender.fill(frame)
            row, cache = rows[name], contender.engine.cache
            row["latency_s"][frame] = contender.watch(1)
            row["kv_bytes"][frame] = cache.stored_bytes
            row["most_reserved_bytes"] = max(row["most_reserved_bytes"], cache.reserved_bytes)
        if (frame + 1) % max(frames // 15, 1) == 0:
            say(f"  frame {frame + 1} of {frames}, {time.perf_counter() - begin:.0f} s")
    for name, row in rows.items():
        if limits[name] is not None and row["most_reserved_bytes"] > limits[name]:
            raise RuntimeError(
                f"{name} took {row['most_reserved_bytes']} bytes, more than the {limits[name]} announced"
            )
    with mmskip.trace(models["mod"].llm) as trace:
        running["mod"].watch(1)
    rows["mod"]["ideal"] = mmskip.cost(models["mod"].llm, trace).ideal_speedup
    return rows


def flat(model: VideoLLM, frames: int, window: int) -> dict[str, Any]:
    """Latency of the late frames over that of the early ones under a window, one of each in turn."""
    starts, size = [begin for begin, _ in spans(frames)], spans(frames)[0][1] - spans(frames)[0][0]
    pair = [Contender(model, window=window) for _ in starts]
    for contender, start in zip(pair, starts, strict=True):
        contender.fill(start - LEAD_IN)
        while contender.seen < start:
            contender.watch(1)
    times: list[list[float]] = [[], []]
    for index in range(size):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            times[which].append(pair[which].watch(1))
    first, last = map(statistics.median, times)
    ratios = sorted(late / early for early, late in zip(*times, strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if size > 1 else ratios * 3
    return {
        "early_ms": round(1000 * first, 3),
        "late_ms": round(1000 * last, 3),
        "frames_timed": size,
        "late_over_early": round(last / first, 4),
        "paired": [round(value, 4) for value in quartiles],
        "kv_bytes": [contender.engine.cache.stored_bytes for contender in pair],
    }


def grid(
    models: dict[str, VideoLLM],
    sizes: tuple[Sequence[int], Sequence[int], Sequence[int]],
    warm: int,
    repeats: int,
    most: int,
    say: Callable[[str], None],
    known: Sequence[dict[str, Any]] = (),
    keep: Callable[[list[dict[str, Any]]], None] = lambda cells: None,
) -> list[dict[str, Any]]:
    """Frames per second of dense and MoD at `warm` frames into the stream, for each (tokens, chunk, streams).

    Args:
        models, sizes, warm, repeats, say: as it says.
        most: tokens of a call, of all streams; cells of larger calls are left out.
        known: cells that need not be measured again.
        keep: called with the cells so far after each of them.
    """
    cells: list[dict[str, Any]] = []
    for tokens, chunk, streams in product(*sizes):
        if (tokens + 1) * chunk * streams > most:
            continue
        place = {"tokens": tokens, "chunk": chunk, "streams": streams}
        cell = next((cell for cell in known if place.items() <= cell.items()), None)
        if cell is None:
            pair = {name: Contender(model, tokens, chunk, streams) for name, model in models.items()}
            cell = {**place, **_cell(models, pair, chunk * streams, warm, repeats)}
        cells.append(cell)
        keep(cells)
        say(
            f"  {tokens:2d} tokens, {chunk} frames a call, {streams} streams: {cell['speedup']:.2f}x "
            f"(counted {cell['ideal']:.2f}x), {cell['mod_frames_per_second']:.1f} frames/s"
        )
    return cells


def _cell(
    models: dict[str, VideoLLM], pair: dict[str, Contender], frames: int, warm: int, repeats: int
) -> dict[str, Any]:
    """The figures of one cell, whose calls hold `frames` frames in all."""
    chunk = pair["mod"].engine.settings.chunk
    for contender in pair.values():
        contender.fill(warm)
        contender.watch(chunk)
    with mmskip.trace(models["mod"].llm) as trace:
        pair["mod"].watch(chunk)
    ideal = mmskip.cost(models["mod"].llm, trace).ideal_speedup
    pair["dense"].watch(chunk)
    times: dict[str, list[float]] = {name: [] for name in pair}
    for index in range(repeats):
        order = list(pair.items())[:: 1 if index % 2 == 0 else -1]
        for name, contender in order:
            times[name].append(contender.watch(chunk))
    ratios = [dense / mod for dense, mod in zip(times["dense"], times["mod"], strict=True)]
    return {
        "speedup": round(statistics.median(ratios), 3),
        "ideal": round(ideal, 3),
        **{
            f"{name}_frames_per_second": round(frames / statistics.median(seconds), 2)
            for name, seconds in times.items()
        },
        **{f"{name}_kv_bytes": pair[name].engine.cache.stored_bytes for name in pair},
    }


def prefill(models: dict[str, VideoLLM], frames: int, pairs: int) -> dict[str, Any]:
    """One call with `frames` frames of 10 tokens: MoD against dense, beside the counted ideal."""

    def run(name: str) -> None:
        Contender(models[name], chunk=frames).watch(frames)

    with mmskip.trace(models["mod"].llm) as trace:
        run("mod")
    ideal = mmskip.cost(models["mod"].llm, trace).ideal_speedup
    ratio = interleaved_ratio(lambda: run("dense"), lambda: run("mod"), pairs, warmup=1)
    return {"frames": frames, **summary(ratio, ideal)}


class Results:
    """The result file, written after every part; parts that an earlier run measured alike are taken from it.

    Args:
        path: the file.
        about: what all parts depend on, besides the machine and the commit.
        fresh: take nothing.
    """

    def __init__(self, path: Path, about: dict[str, Any], fresh: bool) -> None:
        self.path = path
        where = environment()
        self.result: dict[str, Any] = {**about, "device": where["device"], "environment": where}
        found = {} if fresh or not path.is_file() else json.loads(path.read_text())
        same = all(found.get(key) == value for key, value in json.loads(json.dumps(self.result)).items())
        # changes that are not committed may have changed what is measured
        self._found = found if same and not where["dirty"] else {}

    def known(self, part: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the measurements of a part with these settings, or None."""
        found = self._found.get(part)
        return found if found and found["settings"] == json.loads(json.dumps(settings)) else None

    def keep(self, part: str, settings: dict[str, Any], values: dict[str, Any]) -> None:
        """Write a part, beside those that are there."""
        self.result[part] = {"settings": settings, **values}
        write_json(self.all, self.path)

    @property
    def all(self) -> dict[str, Any]:
        """Measurements of this run, and earlier ones with the same settings."""
        return {**self._found, **self.result}


def measure(
    args: argparse.Namespace, models: dict[str, VideoLLM], results: Results, say: Callable[[str], None]
) -> None:
    """The parts that are asked for."""
    window = min(WINDOW_FRAMES, args.frames // 6) * 11
    if "position" in args.parts:
        settings = {"frames": args.frames, "window": window, "probes": PROBES, "probe_frames": PROBE_FRAMES}
        say(f"position: {args.frames} frames of 10 tokens, window {window} tokens")
        found = results.known("position", settings)
        if found is None:
            found = read_position(position(models, args.frames, window, say), args.frames, say)
        results.keep("position", settings, found)
    if "flat" in args.parts:
        settings = {"frames": args.frames, "window": window, "lead_in": LEAD_IN}
        say(f"flat: early and late frames in turns, window {window} tokens")
        found = results.known("flat", settings) or flat(models["mod"], args.frames, window)
        results.keep("flat", settings, found)
        say(f"  {found}")
    if "prefill" in args.parts:
        settings = {"frames": args.prefill_frames, "pairs": args.pairs}
        say(f"prefill: {args.prefill_frames} frames of 10 tokens in one call")
        found = results.known("prefill", settings)
        results.keep("prefill", settings, found or prefill(models, args.prefill_frames, args.pairs))
        say(f"  {results.result['prefill']}")
    if "grid" in args.parts:
        say("grid: tokens per frame, frames per call, streams")
        settings = {"warm": args.warm, "repeats": args.pairs, "most": args.most}
        sizes = (args.tokens, args.chunks, args.streams)
        known = (results.known("grid", settings) or {}).get("cells", [])

        def keep(cells: list[dict[str, Any]]) -> None:
            results.keep("grid", settings, {"cells": cells, "verdict": verdict(cells)})

        grid(models, sizes, args.warm, args.pairs, args.most, say, known, keep)
        say(results.result["grid"]["verdict"])


def _median_cell(result: dict[str, Any]) -> dict[str, float]:
    """Median over the cells of the grid; 1 if nothing is compared with dense."""
    cells = result.get("grid", {}).get("cells") or [{"speedup": 1.0, "ideal": 1.0}]
    return {key: round(statistics.median(cell[key] for cell in cells), 3) for key in ("speedup", "ideal")}


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    parts = ["position", "flat", "prefill", "grid"]
    add("--shape", default="claim", choices=SHAPES)
    add("--parts", nargs="+", default=parts, choices=parts)
    add("--frames", type=int, default=2100, help="length of the streams of `position`")
    add("--prefill_frames", type=int, default=600)
    add("--pairs", type=int, default=15, help="paired runs of `prefill`, and repeats of a cell of `grid`")
    add("--tokens", type=int, nargs="+", default=list(TOKENS), help="per frame, in `grid`")
    add("--chunks", type=int, nargs="+", default=list(CHUNKS), help="frames per call, in `grid`")
    add("--streams", type=int, nargs="+", default=list(STREAMS), help="in `grid`")
    add("--most", type=int, default=10_000, help="most tokens of a call in `grid`; larger cells are left out")
    add("--warm", type=int, default=32, help="frames before a cell of `grid` is timed")
    add("--clock", default="wall", choices=CLOCKS)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="result file (default: benchmarks/results/streaming_DEVICE_SHAPE.json)")
    add("--fresh", action="store_true", help="measure everything anew")
    args = parser.parse_args()
    if args.frames < 21:
        parser.error(f"--frames is {args.frames}; expected at least 21")
    Contender.clock = staticmethod(CLOCKS[args.clock])
    shape = SHAPES[args.shape]
    models = {"dense": build(shape, (), args.device), "mod": build(shape, (MOD,), args.device)}
    path = Path(args.out or RESULTS / f"streaming_{args.device}_{args.shape}.json")
    about = {"name": "streaming", "shape": args.shape, "model": asdict(shape), "clock": args.clock}
    about["method"] = MOD.to_dict()
    results = Results(path, about, args.fresh)
    measure(args, models, results, lambda text: print(text, flush=True))
    result = results.all
    measured = result.get("prefill") or result.get("position") or _median_cell(result)
    result |= {"speedup": measured["speedup"], "ideal": measured["ideal"]}
    if result.keys() & {"position", "grid"}:
        save_png(picture(result), path.with_suffix(".png"))
    emit(result, path)


if __name__ == "__main__":
    main()
