"""Shared parts of the evaluations of a video LLM: arguments, data, and the loop over samples."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.narration.module import NarrationData
from mmskip.datasets.narration.windows import Entry, NarrationDataset
from mmskip.datasets.video.features import fingerprint
from mmskip.models.video_llm.module import VideoLLM
from mmskip.train.evaluation.distributed import ProcessGroup
from mmskip.train.evaluation.results_store import ResultsStore
from mmskip.train.load_run import TrainedRun, check_tokens, load_data, tokenizer_folder
from mmskip.utils.files import check_folder

PRECISIONS: dict[str, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
_LEFT_OUT = ("video missing", "corrupt video", "corrupt features")  # what --strict does not forgive


def add_common_arguments(parser: argparse.ArgumentParser, annotations: str) -> None:
    """The arguments of every evaluation of a video LLM; `annotations` says what file is expected."""
    parser.add_argument("--checkpoint", required=True, help="folder of a run, of all runs of a name, or a file")
    parser.add_argument("--config", help="YAML of the run (default: config.yaml beside the checkpoint)")
    parser.add_argument("--annotations", help=f"{annotations} (default: what the run was trained on)")
    parser.add_argument("--videos", help="folder of the annotated videos")
    parser.add_argument("--features", help="folder filled by python -m mmskip.datasets.video.encode --out")
    parser.add_argument("--split", choices=SPLITS, help="default: test, or val where there is no test split")
    parser.add_argument("--out", help="folder of the results (default: evaluation/ in the folder of the run)")
    parser.add_argument("--batch_size", type=int, default=8, help="samples at a time and rank (default 8)")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes per rank (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: as trained")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if anything had to be left out")


@dataclass(frozen=True)
class Task:
    """Subject of an evaluation: a model, a split of data, and how.

    Attributes:
        name: of the evaluation.
        run, model, data, split: see there.
        group: the processes.
        precision: key of `PRECISIONS`.
        out: folder of the results.
        options: the arguments.
    """

    name: str
    run: TrainedRun
    model: VideoLLM
    data: NarrationData
    split: str
    group: ProcessGroup
    precision: str
    out: Path
    options: argparse.Namespace

    @classmethod
    def of(
        cls, name: str, run: TrainedRun, model: VideoLLM, options: argparse.Namespace, group: ProcessGroup, **data: Any
    ) -> "Task":
        """Prepare the data of a run for one evaluation (a collective call).

        Args:
            name: of the evaluation.
            run: the run.
            model: its model.
            options: the arguments.
            group: the processes.
            **data: passed to `load_data`.

        Raises:
            ValueError: the data cannot be had, or does not fit the model.
        """
        if options.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {options.batch_size}")
        if options.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {options.num_workers}")
        out = check_folder(options.out or run.folder / "evaluation" / name)
        module, split = _data(run, options, data)
        if group.first:
            module.prepare_data()
        group.wait()
        check_fit(model, module)
        precision = options.precision or (run.precision if run.precision in PRECISIONS else "32-true")
        return cls(name, run, model, module, split, group, precision, out, options)

    def store(self, folder: Path, dataset: NarrationDataset, **settings: Any) -> ResultsStore:
        """The store of an evaluation of `dataset`, which depends on these settings and on those of the task."""
        all_settings = {
            "evaluation": self.name,
            "checkpoint": fingerprint(self.run.checkpoint),
            "split": self.split,
            "features": self.data.features_key,
            "precision": self.precision,
            **settings,
        }
        return ResultsStore(
            folder, all_settings, {entry.uid: self._sample_id(entry) for entry in dataset.entries}, self.group
        )

    def _sample_id(self, entry: Entry) -> str:
        """Hash of a sample's text, turns and video, on which its result depends besides the settings."""
        content = self.data.store.content(entry.features)
        return sha256(repr((entry.instruction, entry.turns, content)).encode()).hexdigest()[:16]

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the task's precision."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.group.device.type, dtype)

    def each(
        self,
        dataset: NarrationDataset,
        store: ResultsStore,
        score: Callable[[list[dict[str, Any]]], Sequence[dict[str, Any]]],
        label: str,
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Score every sample that has no result yet (a collective call).

        Args:
            dataset: the samples.
            store: where results are kept.
            score: gives the record of each sample of a batch; run without gradients.
            label: of the progress bar.

        Returns:
            The records by uid, and the message of each sample that could not be read.
        """
        todo = [index for index, entry in enumerate(dataset.entries) if entry.uid not in store.done]
        share = todo[self.group.rank :: self.group.world]
        loader: DataLoader = DataLoader(
            Subset(Guarded(dataset), share),
            batch_size=self.options.batch_size,
            num_workers=self.options.num_workers,
            collate_fn=list,
        )
        broken: dict[str, str] = {}
        bar = tqdm(total=len(share), desc=label, unit="sample", disable=not self.group.first or not share)
        with bar, torch.no_grad(), self.autocast():
            for items in loader:
                broken.update({item.uid: item.message for item in items if isinstance(item, Unreadable)})
                samples = [item for item in items if not isinstance(item, Unreadable)]
                if samples:
                    store.add(score(samples))
                bar.update(len(items))
        records = store.close()
        return records, {uid: message for part in self.group.gather(broken) for uid, message in part.items()}

    def left_out(self, broken: dict[str, str]) -> dict[str, Any]:
        """Samples left out: counts by reason with the first names, and the message of each broken file."""
        report = self.data.reports.get(self.split)
        return {
            "counts": dict(self.data.counts.get(self.split, {})),
            "examples": report.examples if report else {},
            "broken": {**self.data.broken, **broken},
        }

    def print_left_out(self, left_out: Mapping[str, Any]) -> None:
        """Print the counts of skipped samples."""
        print("\nleft out or changed:" + ("" if left_out["counts"] else " nothing"))
        for reason, count in sorted(left_out["counts"].items()):
            names = left_out["examples"].get(reason, [])
            shown = f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else ""
            print(f"  {reason}: {count}{shown}")
        for name, message in left_out["broken"].items():
            print(f"  could not be read: {name}: {message}")

    def status(self, left_out: dict[str, Any]) -> int:
        """Exit status: 1 if something was left out and --strict given."""
        lost = left_out["broken"] or any(left_out["counts"].get(reason) for reason in _LEFT_OUT)
        return 1 if self.options.strict and lost else 0


def _data(run: TrainedRun, options: argparse.Namespace, data: dict[str, Any]) -> tuple[NarrationData, str]:
    """The data module of an evaluation, and its split."""
    if (options.annotations is None) != (options.videos is None):
        raise ValueError("--annotations and --videos belong together; give both, or none for the data of the run")
    if options.annotations is None and getattr(options, "format", "auto") != "auto":
        raise ValueError(f"--format {options.format} belongs to --annotations; give them, or omit the format")
    settings = (run.config.get("data") or {}).get("init_args") or {}
    own, folder = settings.get("annotations"), tokenizer_folder(run)
    known = list(SPLITS) if own is None else [split for split in SPLITS if split in own]
    split = options.split or ("test" if options.annotations or "test" in known else "val")
    overrides: dict[str, Any] = {}
    if options.annotations:
        overrides = {"annotations": {split: options.annotations}, "video_dir": {split: options.videos}}
        overrides |= {key: getattr(options, key) for key in ("format",) if hasattr(options, key)}
    elif own is not None and split not in own:
        raise ValueError(f"the run has no annotations for split {split!r}, only for {', '.join(known)}; give --split")
    elif own is not None and folder:
        overrides["annotations"] = {split: own[split]}  # the other splits need not be encoded
    if folder and "annotations" in overrides:
        overrides["tokenizer"] = folder
    if options.features:
        overrides["features_dir"] = options.features
    module = load_data(run, **overrides, **data)
    if not isinstance(module, NarrationData):
        raise ValueError(f"the run's data is {type(module).__name__}; an evaluation needs a NarrationData")
    return module, split


def check_fit(model: VideoLLM, data: NarrationData) -> None:
    """Refuse data whose tokens or features are not those the model was trained with.

    Raises:
        ValueError: a setting differs; the message names it and the remedy.
    """
    check_tokens(model, data)
    for name, found in (("feature_dim", data.feature_dim), ("fps", data.fps)):
        if model.hparams[name] != found:
            raise ValueError(
                f"the model was trained with {name}={model.hparams[name]}, the data has {found}; use the run's own "
                "tower and rate (--config)"
            )


@dataclass(frozen=True)
class Unreadable:
    """A sample whose features cannot be read, and why."""

    uid: str
    message: str


class Guarded(Dataset[Any]):
    """A dataset that gives `Unreadable` instead of an error: one bad file must not end an evaluation."""

    def __init__(self, dataset: NarrationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return Unreadable(self.dataset.entries[index].uid, str(error))
