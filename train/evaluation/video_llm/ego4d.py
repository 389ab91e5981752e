"""Streaming narration: LM-PPL, LM-Correctness, TimeDiff and Fluency of a checkpoint, and sweeps of its budget."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch

from mmskip import viz
from mmskip.datasets.narration.index import FORMATS
from mmskip.datasets.narration.turns import collate_narration
from mmskip.datasets.narration.windows import NarrationDataset
from mmskip.models.common.methods import freeze
from mmskip.models.video_llm.metrics import TurnScore, averages
from mmskip.models.video_llm.scoring import score_turns
from mmskip.train.evaluation.distributed import process_group
from mmskip.train.evaluation.video_llm.compute_sweep import ROUTERS, Budgets, Variant, plan_variants, variant_cost
from mmskip.train.evaluation.video_llm.task import Task, add_common_arguments
from mmskip.train.load_run import find_run, load_model
from mmskip.train.reports.text import metrics_table
from mmskip.utils.files import write_json

MEASURED_SAMPLES = 4
_SCORE = ("nll", "correct", "text_tokens", "stream_tokens", "frame_diff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `evaluate.py ego4d`."""
    add_common_arguments(parser, "narrations of any known format")
    parser.add_argument("--format", default="auto", choices=["auto", *FORMATS], help="of --annotations (default: auto)")
    parser.add_argument(
        "--keep", type=float, nargs="+", help="keep ratios: the checkpoint is evaluated at each, without training"
    )
    parser.add_argument("--router", nargs="+", choices=ROUTERS, help="at each keep ratio: the learned one and controls")
    parser.add_argument("--blank", action="store_true", help="also with the video blanked")
    parser.add_argument("--pairs", type=int, default=15, help="paired runs of a measured time; 0: none (default 15)")


def run(options: argparse.Namespace) -> int:
    """Evaluate; returns the exit status."""
    with process_group(options.device) as group:
        if options.pairs == 1 or options.pairs < 0:
            raise ValueError(f"pairs must be 0 or at least 2, got {options.pairs}")
        found = find_run(options.checkpoint, options.config)
        model = load_model(found, group.device)
        budgets = Budgets(model.llm)
        variants = plan_variants(budgets.trained, options.keep, options.router, options.blank)
        task = Task.of("ego4d", found, model, options, group)
        dataset = task.data.dataset(task.split)
        totals: dict[str, dict[str, Any]] = {}
        broken: dict[str, str] = {}
        for variant in variants:
            with budgets.using(variant.methods):
                totals[variant.name], unread = _evaluate(task, dataset, variant)
            broken |= unread
        left_out = task.left_out(broken)
        if group.first:
            if len(variants) > 1:
                _add_compute(task, dataset, budgets, variants, totals)
            _report(task, variants, totals, left_out)
        group.wait()
        return task.status(left_out) if group.first else 0


def _evaluate(task: Task, dataset: NarrationDataset, variant: Variant) -> tuple[dict[str, Any], dict[str, str]]:
    """The totals of one variant, whose samples go to a separate folder; and the samples that could not be read."""
    folder = task.out / variant.name
    methods = freeze(variant.methods)
    blanked = NarrationDataset(dataset.entries, dataset.store, dataset.tokens, variant.blank)
    store = task.store(folder, blanked, methods=methods, blank=variant.blank)

    def score(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        batch = _batch(task, samples)
        return [
            {"uid": uid, "turns": [_record(turn, score) for turn, score in zip(turns, scores, strict=True)]}
            for uid, turns, scores in zip(batch["uid"], batch["turns"], score_turns(task.model, batch), strict=True)
        ]

    records, broken = task.each(blanked, store, score, variant.name)
    fps = task.data.fps
    scored = {uid: [_score(turn) for turn in record["turns"]] for uid, record in sorted(records.items())}
    totals = averages([turns for turns in scored.values() if turns], fps)
    if task.group.first:
        samples = [
            {"uid": uid, **averages([scored[uid]], fps), "told": records[uid]["turns"]} for uid in sorted(scored)
        ]
        write_json({"metrics": totals, "methods": methods, "samples": samples}, folder / "results.json")
    return totals, broken


def _batch(task: Task, samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collate_narration(samples, 0)
    return {key: value.to(task.group.device) if torch.is_tensor(value) else value for key, value in batch.items()}


def _record(turn: Any, score: TurnScore) -> dict[str, Any]:
    return {"time_s": turn.time_s, "narration": turn.narration, **{name: getattr(score, name) for name in _SCORE}}


def _score(record: Mapping[str, Any]) -> TurnScore:
    values = {name: record[name] for name in _SCORE}
    return TurnScore(**values | {"nll": math.inf if values["nll"] is None else values["nll"]})


def _add_compute(
    task: Task, dataset: NarrationDataset, budgets: Budgets, variants: list[Variant], totals: dict[str, dict[str, Any]]
) -> None:
    """Add the cost of each variant, on a few readable samples."""
    samples = []
    for index in range(len(dataset)):
        try:
            samples.append(dataset[index])
        except ValueError:
            continue
        if len(samples) == MEASURED_SAMPLES:
            break
    batch = _batch(task, samples)
    found: dict[Any, dict[str, float | None]] = {}
    with torch.no_grad(), task.autocast():
        for variant in variants:
            if variant.methods not in found:
                found[variant.methods] = variant_cost(task.model, budgets, variant.methods, batch, task.options.pairs)
            totals[variant.name]["compute"] = found[variant.methods]


def _report(task: Task, variants: list[Variant], totals: dict[str, dict[str, Any]], left_out: dict[str, Any]) -> None:
    first = next(iter(totals.values()))
    print(f"\nNarration metrics on {task.split} ({first['samples']:.0f} samples, {first['turns']:.0f} turns)\n")
    print(metrics_table(totals))
    if len(variants) > 1:
        print("\n" + _compute_table(totals))
    results = {
        "name": "ego4d",
        "checkpoint": str(task.run.checkpoint),
        "split": task.split,
        "precision": task.precision,
        "results": totals,
        "left_out": left_out,
    }
    paths = [write_json(results, task.out / "results.json")]
    points = [
        {
            "label": variant.name,
            "value": totals[variant.name]["lm_ppl"],
            "counted": totals[variant.name]["compute"]["counted"],
            "measured": totals[variant.name]["compute"]["measured"],
            "series": variant.series,
            "highlight": variant.series == "learned",
        }
        for variant in variants
        # a blanked point would flatten all others, so it is written in words
        if "compute" in totals[variant.name] and not variant.blank and math.isfinite(totals[variant.name]["lm_ppl"])
    ]
    if points:
        blank = [f"video blanked: LM-PPL {totals[v.name]['lm_ppl']:.3g}" for v in variants if v.blank]
        note = ", ".join([f"one checkpoint at other budgets, {task.split} split", *blank])
        figure = viz.quality_against_compute(points, note=note)
        paths.append(viz.save_png(figure, task.out / "quality_compute.png"))
    task.print_left_out(left_out)
    print("written to " + ", ".join(map(str, paths)))


def _compute_table(totals: Mapping[str, Mapping[str, Any]]) -> str:
    width = max(map(len, totals))
    lines = [f"{'share of dense:':<{width}}{'counted FLOPs':>16}{'measured time':>16}  quartiles"]
    for name, values in totals.items():
        compute = values["compute"]
        line = f"{name:<{width}}{compute['counted']:>16.3f}"
        if compute["measured"] is not None:
            line += f"{compute['measured']:>16.3f}  {compute['low']:.3f} to {compute['high']:.3f}"
        lines.append(line)
    return "\n".join(lines)
