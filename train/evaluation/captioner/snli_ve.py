"""Visual entailment: accuracy of a captioner's checkpoint, and sweeps of its exits."""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mmskip.datasets.captioning.snli_ve import LABELS
from mmskip.models.captioner.module import Captioner
from mmskip.train.evaluation.captioner.exit_sweep import Recorder, depths, encoder_exits
from mmskip.train.evaluation.captioner.task import Batch, CaptionTask, add_run_arguments, encoded, variants_of
from mmskip.train.evaluation.distributed import process_group
from mmskip.utils.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `evaluate.py snli_ve`."""
    add_run_arguments(parser)
    parser.add_argument("--annotations", help="a SNLI-VE file (default: what the run was trained on)")


def run(options: argparse.Namespace) -> int:
    """Evaluate; returns the exit status."""
    if options.checkpoint is None:
        raise ValueError("give --checkpoint, the run of a captioner")
    variants = variants_of(options)
    with process_group(options.device) as group:
        task = CaptionTask.of("snli_ve", "entailment", options.annotations, options, group)
        task.check(variants)
        totals: dict[str, dict[str, Any]] = {}
        for variant in variants:
            records = task.evaluate(variant, judged)
            rows = [row for uid in sorted(records) for row in records[uid]["rows"]]
            totals[variant.name] = {**variant.to_dict(), "metrics": accuracy(rows), "exits": depths(rows, task.model)}
            if group.first:
                write_json(totals[variant.name] | {"rows": rows}, task.out / variant.name / "results.json")
        status = 0
        if group.first:
            for name, cost in task.costs(variants, answer).items():
                totals[name]["compute"] = cost
            status = task.report(totals, ("accuracy",))
        group.wait()
        return status


def answer(model: Captioner, batch: Batch) -> Any:
    """The judgements of all pairs of a batch."""
    return model.judge(*encoded(model, batch, batch["entailment"]))


def judged(model: Captioner, batch: Batch, record: Recorder) -> list[dict[str, Any]]:
    """The record of each image of a batch: its pairs, the answers, and the layers that ran."""
    texts = batch["entailment"]
    states = encoded(model, batch, texts)
    images, prompts = encoder_exits(record, texts.image)
    said = model.judge(*states).argmax(-1).tolist()
    layers = record.decoder[-1][:, -1].tolist()
    found: dict[str, dict[str, Any]] = {uid: {"uid": uid, "rows": []} for uid in batch["image_ids"]}
    for row, place in enumerate(texts.image.tolist()):
        found[batch["image_ids"][place]]["rows"].append(
            {
                "uid": texts.uids[row],
                "label": LABELS[texts.label[row]],
                "answer": LABELS[said[row]],
                "right": texts.label[row] == said[row],
                "image": images[row],
                "prompt": prompts[row],
                "decoder": layers[row],
            }
        )
    return list(found.values())


def accuracy(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Share of right answers, in all and by label."""
    kept = list(rows)
    asked = Counter(row["label"] for row in kept)
    right = Counter(row["label"] for row in kept if row["right"])
    by_label = {f"accuracy_{label}": right[label] / asked[label] for label in LABELS if asked[label]}
    return {"accuracy": right.total() / len(kept), "pairs": float(len(kept)), **by_label}
