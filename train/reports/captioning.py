"""The report of a captioner: accuracy, CIDEr, loss, and captions beside the truth."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from mmskip.datasets.captioning.batch import PictureEntry
from mmskip.datasets.captioning.coco import write_results
from mmskip.datasets.captioning.snli_ve import LABELS
from mmskip.models.captioner.metrics import score_captions
from mmskip.models.captioner.module import Captioner
from mmskip.train.metrics.majority import majority_accuracy
from mmskip.train.reports.base import RunReport, loaders_of, rank_suffix
from mmskip.utils.files import write_json

COLUMNS = (("accuracy", "entailment acc."), ("cider", "CIDEr"), ("caption_loss", "caption loss"))


class CaptionReport(RunReport):
    """Prints and writes, at the end of fit, validate and test: accuracy, CIDEr and loss of a `Captioner` beside those
    of the untrained model and of a majority baseline, and captions beside the truth; after predict: all answers.

    Files in the folder of the run: `report.txt`, `results.json`; `captions.json` (COCO's result format),
    `answers.json`.

    The untrained model is evaluated by Lightning's check, if that runs over the full validation set
    (`trainer.num_sanity_val_steps: -1`).

    Args:
        samples: captions shown, >= 0.
    """

    model_class = Captioner

    def __init__(self, samples: int = 4) -> None:
        if samples < 0:
            raise ValueError(f"CaptionReport needs samples >= 0, got {samples}")
        super().__init__()
        self.samples = samples
        self._captions: dict[str, str] = {}
        self._answers: dict[str, str] = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the captions and answers of a batch."""
        self._captions |= outputs["captions"]
        self._answers |= {uid: LABELS[place] for uid, place in outputs["answers"].items()}

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the captions and answers of this rank."""
        folder, suffix = Path(trainer.default_root_dir), rank_suffix(trainer)
        paths = []
        if self._captions:
            # COCO's results have no place for a caption without words
            numbered = {int(uid): text.strip() or "?" for uid, text in self._captions.items()}
            paths.append(write_results(numbered, folder / f"captions{suffix}.json"))
        if self._answers:
            paths.append(write_json(self._answers, folder / f"answers{suffix}.json"))
        print(
            f"{len(self._captions)} captions, {len(self._answers)} answers: "
            + (", ".join(map(str, paths)) or "nothing written")
        )

    def report(self, trainer: Trainer, model: Captioner, stage: str) -> None:
        """Print and write accuracy, CIDEr and loss, and some captions."""
        if not trainer.is_global_zero or not loaders_of(trainer, stage) or not model.results:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = {"untrained model": self.untrained} if self.untrained and stage == "val" else {}
        if "train" in data.splits:
            rows["majority baseline"] = majority(data.entries("train"), data.entries(stage))
        rows["this model"] = model.results
        counts = f"{model.results.get('pairs', 0):.0f} pairs, {model.results.get('captions', 0):.0f} captions"
        parts = [f"Results on {stage} ({counts})", table(rows)]
        for uid, (text, truth) in list(model.said.items())[: self.samples]:
            parts.append(f"image {uid}\n  truth  {truth[0]}\n  model  {text}")
        parts += self.training_time()
        results = {
            "stage": stage,
            "metrics": {"model": model.results, **{key: rows[key] for key in rows if key != "this model"}},
        }
        self.write(trainer, results, parts)


def majority(train: Sequence[PictureEntry], entries: Sequence[PictureEntry]) -> dict[str, float]:
    """Score the most frequent training answer and the most frequent training caption, without the images."""
    found = {}
    labels, asked = ([("", pair.label) for entry in part for pair in entry.pairs] for part in (train, entries))
    if labels and asked:
        found["accuracy"] = majority_accuracy(labels, asked)
    captions = Counter(text for entry in train for text in entry.captions)
    references = {entry.uid: entry.captions for entry in entries if entry.captions}
    if captions and len(references) > 1:
        text = captions.most_common(1)[0][0]
        found["cider"] = score_captions(dict.fromkeys(references, text), references).totals["CIDEr"]
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    """One line per model; "-" where a row has no such value."""
    shown = [(key, title) for key, title in COLUMNS if any(key in values for values in rows.values())]
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{title:>17}" for _, title in shown)]
    for name, values in rows.items():
        cells = "".join(f"{values[key]:>17.4f}" if key in values else f"{'-':>17}" for key, _ in shown)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)
