"""How often and how narrowly streams choose otherwise than the offline forward, and the cost of logits in fp32.

    python benchmarks/stream_exact.py --checkpoint runs/videollm_mod       the test videos of a run of `make train`

The checkpoint watches videos in fp32 and in bf16, by chunks of several sizes, one stream or several of a batch, saved
and restored in the middle; each stream is compared with one forward over its full sequence under the recorded
selections. As a control bf16 once more with logits rounded to bf16, as the head alone gives them. The cost is that of
the head of an 8B model for one token: `speedup` is that of the plain bf16 head over the one whose sums stay in fp32.

Each line is kept in the result file as soon as it is there; `--kinds` and `--ways` name a part, and what the file holds
of the same commit, checkpoint and videos stays in it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from common.measure import RESULTS, emit, environment, interleaved_ratio, summary
from common.stream_exactness import Comparison, compare
from mmskip.models.common.fp32_head import fp32_linear
from mmskip.models.video_llm.streaming.settings import StreamSettings
from mmskip.train.load_run import find_run, load_data, load_model
from mmskip.utils.command import CommandParser
from mmskip.utils.files import write_json

KINDS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "bfloat16, rounded": ("bfloat16", True)}
# frames a call, streams of a batch, calls after which they are saved and restored
WAYS = ((1, 1, None), (2, 1, None), (5, 1, None), (1, 5, 40), (5, 5, 12))
HEAD = (128256, 4096)


def watch(model: Any, videos: list[torch.Tensor], head: list[int], way: tuple[Any, ...], rounded: bool) -> Comparison:
    """All videos, as many at once as there are streams."""
    chunk, streams, reopen_after = way
    settings = StreamSettings(chunk=chunk, threshold=model.hparams["silent_threshold"], max_new_tokens=20)
    total = Comparison()
    for start in range(0, len(videos), streams):
        found = compare(model, videos[start : start + streams], head, settings, rounded, reopen_after)
        total.choices += found.choices
        total.different += found.different
        total.largest = max(total.largest, found.largest)
        total.compared += found.compared
        total.flipped += found.flipped
    return total


def known(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Results of an earlier call that are of the same things."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    same = all(found.get(key) == value for key, value in about.items()) and not about["environment"]["dirty"]
    return found.get("results", {}) if same else {}


def as_json(total: Comparison) -> dict[str, Any]:
    """A comparison, JSON-ready; margins in steps of the model's dtype at its largest logit."""
    return {
        "choices": total.choices,
        "different": len(total.different),
        "decisions_different": sum(item.decision for item in total.different),
        "margins_in_steps": [round(item.margin / item.resolution, 3) for item in total.different],
        "largest_difference_of_a_logit": round(total.largest, 5),
        "selected": total.compared,
        "flipped": total.flipped,
        "flipped_share": round(total.flipped / max(total.compared, 1), 5),
    }


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a run, or a checkpoint file")
    parser.add_argument("--split", default="test", help="of the run's data (default test)")
    parser.add_argument("--samples", type=int, default=30, help="videos (default 30)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--ways", type=int, nargs="+", default=list(range(len(WAYS))), help="numbers in WAYS")
    parser.add_argument("--pairs", type=int, default=15, help="paired runs of the head")
    parser.add_argument("--head", type=int, nargs=2, default=HEAD, help="its vocabulary and width")
    parser.add_argument("--out", type=Path, default=RESULTS / "stream_exact.json", help="result file")
    args = parser.parse_args()
    run = find_run(args.checkpoint)
    data = load_data(run)
    dataset = data.dataset(args.split)
    head = data.tokens.head(data.instruction)
    videos = [dataset[index]["features"] for index in range(min(args.samples, len(dataset)))]
    where = environment()
    checkpoint = f"{run.folder.parent.name}/{run.folder.name}/{run.checkpoint.name}"
    about = {"name": "stream_exact", "environment": where, "checkpoint": checkpoint, "split": args.split}
    about["videos"] = len(videos)
    results = known(args.out, about)
    for name in args.kinds:
        dtype, rounded = KINDS[name]
        model = load_model(run, dtype=dtype)
        for chunk, streams, reopen_after in (WAYS[number] for number in args.ways):
            begin = time.perf_counter()
            total = watch(model, videos, head, (chunk, streams, reopen_after), rounded)
            way = f"{name}, chunks of {chunk}, {streams} streams" + (", restored" if reopen_after else "")
            results[way] = as_json(total)
            write_json({**about, "results": results}, args.out)
            print(f"{way} ({time.perf_counter() - begin:.0f} s): {results[way]}", flush=True)
    weight, hidden = torch.randn(*args.head).bfloat16(), torch.randn(1, args.head[1]).bfloat16()
    with torch.inference_mode():
        ratio = interleaved_ratio(lambda: F.linear(hidden, weight), lambda: fp32_linear(hidden, weight), args.pairs)
    cost = summary(ratio, 1.0)
    shape = f"head {args.head[0]} x {args.head[1]}, 1 token, bfloat16"
    found = {**about, "shape": shape, "speedup": cost["speedup"], "ideal": 1.0, "head": cost, "results": results}
    emit(found, args.out)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
