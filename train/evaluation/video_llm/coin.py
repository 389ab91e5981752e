"""COIN: top-1 accuracy of step, task, next, procedure and procedure+ by generation."""

import argparse
import math
from collections.abc import Iterable, Mapping
from typing import Any

from mmskip.datasets.narration.formats.coin import TASKS, CoinData, correct_answers
from mmskip.datasets.narration.windows import NarrationDataset
from mmskip.models.common.methods import freeze
from mmskip.models.video_llm.answering import answer
from mmskip.train.evaluation.distributed import process_group
from mmskip.train.evaluation.video_llm.compute_sweep import Budgets
from mmskip.train.evaluation.video_llm.task import Task, add_common_arguments
from mmskip.train.load_run import find_run, load_model
from mmskip.utils.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `evaluate.py coin`."""
    add_common_arguments(parser, "COIN.json")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: those the run was trained on, or all")
    parser.add_argument("--blank", action="store_true", help="with the video blanked, instead of the video")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="longest answer (default 100)")


def run(options: argparse.Namespace) -> int:
    """Evaluate; returns the exit status."""
    with process_group(options.device) as group:
        found = find_run(options.checkpoint, options.config)
        model = load_model(found, group.device)
        overrides = {"tasks": options.tasks} if options.tasks else {}
        task = Task.of(
            "coin",
            found,
            model,
            options,
            group,
            class_path="mmskip.datasets.narration.CoinData",
            **overrides,
        )
        assert isinstance(task.data, CoinData)
        dataset = task.data.dataset(task.split)
        dataset = NarrationDataset(dataset.entries, dataset.store, dataset.tokens, options.blank)
        records, broken = _evaluate(task, dataset)
        left_out = task.left_out(broken)
        if group.first:
            _report(task, records, left_out)
        group.wait()
        return task.status(left_out)


def _evaluate(task: Task, dataset: NarrationDataset) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The record of each question, and the questions whose video could not be read."""
    assert isinstance(task.data, CoinData)
    data, tokens, limit = task.data, task.data.tokens, task.options.max_new_tokens
    classes = data.categories()
    methods = freeze(Budgets(task.model.llm).trained)
    settings = {"methods": methods, "blank": task.options.blank, "max_new_tokens": limit, "classes": classes}
    store = task.store(task.out / ("blank" if task.options.blank else "trained"), dataset, **settings)

    def score(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        records = []
        for sample, ids in zip(samples, answer(task.model, samples, limit), strict=True):
            item, said = data.questions[sample["uid"]], tokens.decode(ids)
            right = correct_answers(said, item.answers, classes[item.task])
            records.append({"uid": item.uid, "task": item.task, "answers": item.answers, "said": said, "right": right})
        return records

    return task.each(dataset, store, score, "coin")


def accuracies(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Top-1 accuracy per task: the share of right answers, each step of a procedure counting as one."""
    records = list(records)
    found = {}
    for task in TASKS:
        right = [ok for record in records if record["task"] == task for ok in record["right"]]
        count = sum(record["task"] == task for record in records)
        if count:
            found[task] = {"accuracy": math.fsum(right) / len(right), "questions": count, "answers": len(right)}
    return found


def _report(task: Task, records: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, Any]) -> None:
    totals = accuracies(records.values())
    blank = ", video blanked" if task.options.blank else ""
    print(f"\nCOIN on {task.split} ({len(records)} questions{blank}): top-1 accuracy\n")
    print("".join(f"{name:>12}" for name in totals))
    print("".join(f"{100 * values['accuracy']:>11.1f}%" for values in totals.values()))
    results = {
        "name": "coin",
        "checkpoint": str(task.run.checkpoint),
        "split": task.split,
        "precision": task.precision,
        "blank": task.options.blank,
        "results": totals,
        "left_out": left_out,
        "samples": [records[uid] for uid in sorted(records)],
    }
    path = write_json(results, task.out / ("results-blank.json" if task.options.blank else "results.json"))
    task.print_left_out(left_out)
    print(f"written to {path}")
