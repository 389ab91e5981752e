"""The report of a video LLM: narration metrics, narrations, savings, pictures."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

import mmskip
from mmskip import viz
from mmskip.datasets.narration.tokenizer import StreamTokens
from mmskip.datasets.narration.turns import collate_narration, frame_index
from mmskip.models.video_llm.metrics import averages
from mmskip.models.video_llm.module import VideoLLM
from mmskip.models.video_llm.speaking import split_rows
from mmskip.train.metrics.majority import MajorityBaseline
from mmskip.train.reports import text
from mmskip.train.reports.base import RunReport, first_batch, loaders_of, rank_suffix
from mmskip.train.savings import counted_savings, measured_speedup, streaming_savings
from mmskip.utils.files import write_json, write_text

PICTURED_FRAMES, MEASURED_SAMPLES = 16, 2


class NarrationReport(RunReport):
    """Prints and writes, at the end of fit, validate and test: the narration metrics beside those of the untrained
    model and of a majority baseline, narrations beside the truth, savings and pictures; after predict: all narrations.

    Files in the folder of the run: `report.txt`, `results.json`, `keep_map.png`, `dropped_patches.png`,
    `quality_compute.png`; `predictions.json`.

    The untrained model is evaluated by Lightning's check before training, if that runs over the full validation set
    (`trainer.num_sanity_val_steps: -1`).

    Args:
        samples: number of samples narrated.
        pairs: paired runs of a step with and without the methods for the measured speed-up; 0: not measured (it takes
            a copy of the language model).
        baseline_batches: training batches whose narrations the majority baseline has seen, at most.
    """

    model_class = VideoLLM
    kept = ("untrained", "baseline")

    def __init__(self, samples: int = 2, pairs: int = 15, baseline_batches: int = 200) -> None:
        if samples < 1 or pairs < 0 or pairs == 1 or baseline_batches < 1:
            raise ValueError(
                "NarrationReport needs samples >= 1, pairs 0 or >= 2, and baseline_batches >= 1, got "
                f"{samples}, {pairs}, {baseline_batches}"
            )
        self.samples, self.pairs, self.baseline_batches = samples, pairs, baseline_batches
        super().__init__()
        self.baseline: dict[str, Any] = {}
        self._predictions: list[dict[str, Any]] = []

    # --- hooks ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the training narrations for the majority baseline."""
        super().on_train_start(trainer, pl_module)
        if not self.baseline:
            self.baseline = self._fit_baseline(trainer, pl_module).state_dict()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the narrations of a batch as text."""
        tokens, fps = StreamTokens.of(trainer.datamodule.tokenizer), pl_module.hparams["fps"]  # type: ignore[attr-defined]
        for (uid, said), turns in zip(outputs, batch["turns"], strict=True):
            start_s = _start_s(turns, fps)
            narrations = [{"time_s": start_s + u.frame / fps, "text": tokens.decode(u.tokens)} for u in said]
            self._predictions.append({"uid": uid, "narrations": narrations})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the narrations of this rank."""
        path = Path(trainer.default_root_dir) / f"predictions{rank_suffix(trainer)}.json"
        write_json({"predictions": self._predictions}, path)
        print(f"narrations of {len(self._predictions)} samples: {path}")

    # --- parts ------------------------------------------------------------------------------------------------------

    def _fit_baseline(self, trainer: Trainer, model: Any) -> MajorityBaseline:
        baseline = MajorityBaseline(model.ids.vocab_size)
        tokens = StreamTokens.of(trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        # a separate loader: the one in use may have begun an epoch
        with torch.random.fork_rng():
            for index, batch in enumerate(trainer.datamodule.train_dataloader()):  # type: ignore[attr-defined]
                if index == self.baseline_batches:
                    break
                for turn in (turn for turns in batch["turns"] for turn in turns):
                    baseline.fit(len(turn.stream), tokens.narration(turn.narration))
        return baseline

    def report(self, trainer: Trainer, model: VideoLLM, stage: str) -> None:
        """Print and write the metrics, some narrations, savings and pictures."""
        scored, loaders = model.metrics.gathered(), loaders_of(trainer, stage)
        if not trainer.is_global_zero or not loaders or not scored:
            return
        folder = Path(trainer.default_root_dir)
        fps = model.hparams["fps"]
        rows = {"untrained model": self.untrained} if self.untrained and stage == "val" else {}
        if self.baseline:
            rows["majority baseline"] = self._score_baseline(trainer, model, list(scored), fps)
        rows["this model"] = model.results
        # a test runs in inference mode, in which nothing can be trained, and its tensors stay so
        with torch.inference_mode(False), trainer.precision_plugin.forward_context():
            batch = model.transfer_batch_to_device(first_batch(loaders), model.device, 0)
            narrated = self._narrate(trainer, model, batch, fps)
            savings, figures = self._savings(trainer, model, batch)
        label = text.model_label(model.hparams["methods"])
        counts = f"{model.results['samples']:.0f} samples, {model.results['turns']:.0f} turns"
        parts = [f"Narration metrics on {stage} ({counts})", text.metrics_table(rows), *narrated]
        if model.hparams["methods"]:
            parts.append(text.savings_lines(label, savings))
        parts += self.training_time()
        results = {
            "name": folder.parent.name,
            "label": label,
            "stage": stage,
            "task": text.task_id(scored),
            "methods": model.hparams["methods"],
            "metrics": {"model": model.results, **{key: rows[key] for key in rows if key != "this model"}},
            "savings": savings,
        }
        self._write(folder, results, figures, parts)
        print("\n\n".join(["", *parts]))

    def _score_baseline(self, trainer: Trainer, model: VideoLLM, samples: list[Any], fps: float) -> dict[str, float]:
        baseline = MajorityBaseline(model.ids.vocab_size)
        baseline.load_state_dict(self.baseline)
        tokens = StreamTokens.of(trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        scores = [
            baseline.score([(len(turn.stream), tokens.narration(turn.narration)) for turn in turns])
            for _, turns in samples
        ]
        return averages(scores, fps)

    def _narrate(self, trainer: Trainer, model: VideoLLM, batch: dict[str, Any], fps: float) -> list[str]:
        tokens = StreamTokens.of(trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        texts = []
        for sample in split_rows(batch)[: self.samples]:
            said = [(utterance.frame, tokens.decode(utterance.tokens)) for utterance in model.narrate(sample)]
            start_s = _start_s(sample["turns"], fps)
            texts.append(text.narration_lines(sample["uid"], sample["turns"], said, start_s, fps))
        return texts

    def _savings(
        self, trainer: Trainer, model: VideoLLM, batch: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Savings of a training step, and figures of the tokens an evaluation keeps."""
        # a small batch, so that the measured pairs take seconds
        rows = split_rows(batch)[:MEASURED_SAMPLES]
        batch = model.transfer_batch_to_device(collate_narration(rows, 0), model.device, 0)
        sample = rows[0]
        step = counted_savings(model, batch)
        savings: dict[str, Any] = {"training_step": step, "streaming": streaming_savings(model, sample)}
        if self.pairs and mmskip.applied(model.llm):
            savings["measured"] = measured_speedup(model, batch, self.pairs)
        model.eval()
        with torch.no_grad(), mmskip.trace(model.llm) as trace:  # as it selects in use, without exploration
            model.loss_sums(batch)
        figures = {}
        if trace.forwards[0].layout is not None:
            figures["keep_map"] = viz.keep_map(trace.forwards[0])
            if hasattr(trainer.datamodule, "frames"):  # type: ignore[attr-defined]
                frames = trainer.datamodule.frames(sample["uid"], PICTURED_FRAMES)  # type: ignore[attr-defined]
                figures["dropped_patches"] = viz.dropped_patches(frames, trace.forwards[0])
        return savings, figures

    def _write(self, folder: Path, results: dict[str, Any], figures: dict[str, Any], parts: list[str]) -> None:
        write_json(results, folder / "results.json")
        points = text.comparable_points(results, folder, folder.parent.parent)
        if points:
            figures["quality_compute"] = viz.quality_against_compute(points)
        paths = [viz.save_png(figure, folder / f"{name}.png") for name, figure in figures.items()]
        parts.append("written to " + ", ".join(str(path) for path in [folder / "results.json", *paths]))
        write_text("\n\n".join(parts) + "\n", folder / "report.txt")


def _start_s(turns: Any, fps: float) -> float:
    """Time of a sample's first frame in its video: a sample may begin in the middle."""
    if not turns:
        return 0.0
    first = turns[0]
    return max(0, frame_index(first.time_s, fps) - (first.frames[1] - 1)) / fps
