"""Shared parts of the evaluations of a captioner: arguments, the run's model and data, and the loop over images."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmskip import viz
from mmskip.datasets.captioning.batch import CaptionCollate, PictureDataset, PictureEntry, Texts
from mmskip.datasets.captioning.module import CaptionData
from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.video.features import fingerprint
from mmskip.models.captioner.build import token_ids
from mmskip.models.captioner.module import Captioner
from mmskip.train.evaluation.captioner.exit_sweep import (
    FULL,
    ExitVariant,
    Recorder,
    add_exit_arguments,
    current_settings,
    exit_cost,
    exits_table,
    plan,
    recording,
    using,
)
from mmskip.train.evaluation.distributed import ProcessGroup
from mmskip.train.evaluation.results_store import ResultsStore
from mmskip.train.load_run import TrainedRun, find_run, load_captioner, load_data, tokenizer_folder
from mmskip.utils.files import check_folder, write_json

Batch = dict[str, Any]
Score = Callable[[Captioner, Batch, Recorder], list[dict[str, Any]]]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every evaluation of a captioner."""
    parser.add_argument("--checkpoint", help="folder of a run, of all runs of a name, or a file")
    parser.add_argument("--config", help="YAML of the run (default: config.yaml beside the checkpoint)")
    parser.add_argument("--images", help="folder of the annotated images")
    parser.add_argument("--split", help="train, val or test (default: test, or val where there is no test split)")
    parser.add_argument("--out", help="folder of the results (default: in the folder of the run); of --results: file")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time and rank (default 8)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--limit", type=int, help="only the first images of the split")
    add_exit_arguments(parser)


@dataclass(frozen=True)
class CaptionTask:
    """A captioner's run and the images it is evaluated on.

    Attributes:
        name: of the evaluation.
        run, model: see there.
        dataset: the images.
        collate: makes their batches.
        split: which.
        group: the processes.
        out: folder of the results.
        options: the arguments.
        left_out: of the annotations, counted by reason.
    """

    name: str
    run: TrainedRun
    model: Captioner
    dataset: PictureDataset
    collate: CaptionCollate
    split: str
    group: ProcessGroup
    out: Path
    options: argparse.Namespace
    left_out: dict[str, int]

    @classmethod
    def of(
        cls, name: str, task: str, files: str | None, options: argparse.Namespace, group: ProcessGroup
    ) -> "CaptionTask":
        """Load a run and the images with one kind of text (a collective call).

        Args:
            name: of the evaluation.
            task: "caption" or "entailment".
            files: annotations; None: those of the run.
            options: the arguments.
            group: the processes.

        Raises:
            ValueError: the run or its data cannot be had, or do not fit each other.
        """
        if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
            raise ValueError(f"batch_size is {options.batch_size} and limit {options.limit}; expected at least 1")
        if (files is None) != (options.images is None):
            raise ValueError("annotations and --images belong together; give both, or none for the data of the run")
        run = find_run(options.checkpoint, options.config)
        model = load_captioner(run, group.device)
        out = check_folder(options.out or run.folder / "evaluation" / name)
        data, split = _data(run, task, files, options)
        if group.first:
            data.prepare_data()
        group.wait()
        if token_ids(data.tokenizer, data.collate().answers) != model.hparams["tokens"]:
            raise ValueError(
                "the tokenizer of the data is not the one the model was trained with; point data.tokenizer at the "
                "run's folder 'tokenizer', or give the data settings of its training (--config)"
            )
        entries = [entry for entry in data.entries(split) if (entry.captions if task == "caption" else entry.pairs)]
        dataset = PictureDataset(entries[: options.limit], data.image_size, data.resize)
        counts = dict(data.reports[split].counts)
        return cls(name, run, model, dataset, data.collate(), split, group, out, options, counts)

    def blanked(self) -> PictureDataset:
        """Return the dataset with black images."""
        return PictureDataset(self.dataset.entries, self.dataset.size, self.dataset.resize, blank=True)

    def batch(self, dataset: PictureDataset, numbers: Sequence[int]) -> Batch:
        """Some images and their texts, on the device."""
        found = self.collate([dataset[number] for number in numbers])
        return {key: value.to(self.group.device) if hasattr(value, "to") else value for key, value in found.items()}

    def check(self, variants: Sequence[ExitVariant]) -> None:
        """Apply every setting, before anything is computed or written.

        Raises:
            ValueError: the model cannot have one of them.
        """
        for variant in variants:
            with using(self.model, variant.config):
                pass

    def evaluate(self, variant: ExitVariant, score: Score, **settings: Any) -> dict[str, dict[str, Any]]:
        """The records of all images in one setting by uid; those known from an interrupted run are not made again (a
        collective call).

        Args:
            variant: the setting.
            score: the records of a batch.
            **settings: further settings the records depend on.
        """
        dataset = self.blanked() if variant.blank else self.dataset
        all_settings = {
            "evaluation": self.name,
            "checkpoint": fingerprint(self.run.checkpoint),
            "split": self.split,
            **variant.to_dict(),
            **settings,
        }
        samples = {entry.uid: _sample_id(entry) for entry in dataset.entries}
        store = ResultsStore(self.out / variant.name, all_settings, samples, self.group, current_settings)
        todo = [number for number, entry in enumerate(dataset.entries) if entry.uid not in store.done]
        share, size = todo[self.group.rank :: self.group.world], self.options.batch_size
        bar = tqdm(total=len(share), desc=variant.name, unit="image", disable=not self.group.first or not share)
        with bar, torch.no_grad(), using(self.model, variant.config), recording(self.model) as record:
            for begin in range(0, len(share), size):
                numbers = share[begin : begin + size]
                record.clear()
                store.add(score(self.model, self.batch(dataset, numbers), record))
                bar.update(len(numbers))
        return store.close()

    def costs(
        self, variants: Sequence[ExitVariant], call: Callable[[Captioner, Batch], Any]
    ) -> dict[str, dict[str, float]]:
        """Measure the cost of each setting on the first images, one by one."""
        count = min(self.options.timed, len(self.dataset))
        batches = [self.batch(self.dataset, [number]) for number in range(count)]
        calls = [lambda model, batch=batch: call(model, batch) for batch in batches]
        found = {}
        with torch.no_grad():
            for variant in variants:
                if count and not variant.blank:
                    found[variant.name] = exit_cost(self.model, variant.config, calls, self.options.pairs_timed)
        return found

    def report(self, totals: dict[str, dict[str, Any]], metrics: Sequence[str]) -> int:
        """Print and write the totals of all settings; the exit status."""
        print(f"\n{self.name} on {self.split} ({len(self.dataset)} images)\n")
        print(exits_table(totals, metrics))
        content = {
            "name": self.name,
            "checkpoint": str(self.run.checkpoint),
            "split": self.split,
            "images": len(self.dataset),
            "results": totals,
            "left_out": self.left_out,
        }
        if self.left_out:
            print("\nleft out: " + ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items()))
        paths = [write_json(content, self.out / "results.json"), *self._draw(totals, metrics[0])]
        print("\nwritten to " + ", ".join(map(str, paths)))
        return 0

    def _draw(self, totals: dict[str, dict[str, Any]], metric: str) -> list[Path]:
        """Exit depths of every setting, and the first metric against compute."""
        left = {name: one for name, one in totals.items() if one["exits"]["layers_left_out"] > 0}
        paths = [
            viz.save_png(viz.exit_depths(one["exits"]["histogram"], note=name), self.out / name / "exit_depths.png")
            for name, one in left.items()
        ]
        points = [
            {"label": name, "value": one["metrics"][metric], "highlight": name in left}
            | {key: one["compute"][key] for key in ("counted", "measured")}
            for name, one in totals.items()
            if "compute" in one
        ]
        if len(points) > 1:
            note = f"one checkpoint at other thresholds, {self.split} split; single samples"
            figure = viz.quality_against_compute(points, metric, lower_is_better=False, note=note)
            paths.append(viz.save_png(figure, self.out / "quality_compute.png"))
        return paths


def encoded(model: Captioner, batch: Batch, texts: Texts) -> tuple[Tensor, Tensor]:
    """Encode what the decoder attends to for each text; states and mask."""
    return model.encode(model.see(batch["images"]), texts)


def variants_of(options: argparse.Namespace) -> list[ExitVariant]:
    """The settings of a sweep; full depth is the first.

    Raises:
        ValueError: a value out of range.
    """
    found = plan(options)
    assert found[0].name == FULL
    return found


def _sample_id(entry: PictureEntry) -> str:
    """Hash of the content of a sample, on which its record depends besides the settings."""
    stamp = entry.path.stat()
    content = (entry.captions, entry.pairs, stamp.st_size, entry.path.name)
    return sha256(repr(content).encode()).hexdigest()[:16]


def _data(run: TrainedRun, task: str, files: str | None, options: argparse.Namespace) -> tuple[CaptionData, str]:
    """The data of an evaluation, and its split."""
    settings = dict((run.config.get("data") or {}).get("init_args") or {})
    named, folder = ("captions", "caption_images") if task == "caption" else ("pairs", "pair_images")
    overrides: dict[str, Any] = {"blank": False, "tasks": [task]}
    known = list(SPLITS) if not settings.get("captions") and not settings.get("pairs") else settings.get(named) or {}
    split = options.split or ("test" if files or "test" in known else "val")
    if files is not None:
        overrides |= {"captions": None, "caption_images": None, "pairs": None, "pair_images": None}
        overrides |= {named: {split: files}, folder: options.images}
        overrides["image_size"] = settings.get("image_size") or (settings.get("generated") or {}).get("image_size", 48)
    elif split not in known:
        raise ValueError(f"the run has no {named} for split {split!r}; it has {', '.join(known) or 'none'}")
    if files is not None or settings.get("tokenizer") is None:
        overrides["tokenizer"] = tokenizer_folder(run) or settings.get("tokenizer")
    return load_data(run, **overrides), split
