"""The report of a run that tunes a VLM: loss, accuracies, savings, answers."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

import mmskip
from mmskip.datasets.chat.batches import last_answer
from mmskip.methods.mixture_of_depths import anneal
from mmskip.models.vlm.module import VLM
from mmskip.train.metrics.majority import blind_baseline
from mmskip.train.reports import text
from mmskip.train.reports.base import RunReport, first_batch, loaders_of, rank_suffix
from mmskip.train.savings import counted_savings, measured_speedup
from mmskip.utils.files import write_json

COLUMNS = (("loss", "loss"), ("token_accuracy", "token acc."), ("answer_accuracy", "answer acc."))


class ChatReport(RunReport):
    """Prints and writes, at the end of fit, validate and test: loss and accuracies of a `VLM` beside those before
    training, and what its methods save; after predict: all answers.

    Files in the folder of the run: `report.txt`, `results.json`; `predictions.json`.

    The model before training is evaluated by Lightning's check, if that runs over the full validation set
    (`trainer.num_sanity_val_steps: -1`). Where the keep ratio is annealed, that is the base model.

    Args:
        pairs: paired runs of a step with and without the methods for the measured speed-up; 0: not measured (it takes
            a copy of the model).
    """

    model_class = VLM
    kept = ("before",)

    def __init__(self, pairs: int = 0) -> None:
        if pairs < 0 or pairs == 1:
            raise ValueError(f"ChatReport needs pairs 0 or >= 2, got {pairs}")
        super().__init__()
        self.pairs = pairs
        self._validated = 0
        self._predictions: list[dict[str, str]] = []

    @property
    def before(self) -> dict[str, float]:
        """The scores of the model before training; checkpoints hold them under this name."""
        return self.untrained

    @before.setter
    def before(self, scores: dict[str, float]) -> None:
        self.untrained = scores

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step; report where validation is no part of training."""
        self._validated = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the answers of a batch as text."""
        tokenizer = trainer.datamodule.processor.tokenizer  # type: ignore[attr-defined]
        for uid, ids in outputs:
            self._predictions.append({"id": uid, "answer": tokenizer.decode(ids, skip_special_tokens=True).strip()})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the answers of this rank beside the true ones."""
        dataset: Any = trainer.predict_dataloaders.dataset  # type: ignore[union-attr]
        truth = {chat.uid: last_answer(chat) for chat in dataset.chats if chat is not None}
        found = [item | {"truth": truth[item["id"]]} for item in self._predictions]
        name = f"predictions{rank_suffix(trainer)}.json"
        path = write_json({"predictions": found}, Path(trainer.default_root_dir) / name)
        print(f"answers to {len(found)} conversations: {path}")

    def report(self, trainer: Trainer, model: VLM, stage: str) -> None:
        """Print and write loss, accuracies and savings."""
        loaders = loaders_of(trainer, stage)
        if not trainer.is_global_zero or not loaders or not model.results:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = {"before": self.before} if self.before and stage == "val" else {}
        name = "this model"
        if trainer.state.fn == TrainerFn.FITTING and self._validated != trainer.global_step:
            name += f" at step {self._validated} of {trainer.global_step}"
        rows[name] = model.results
        label = text.model_label(model.hparams["methods"])
        parts = [f"Results on {stage} ({model.results['answers']:.0f} answers)", _table(rows)]
        blind = blind_baseline(data.folder, stage) if data.files is None else None
        if blind is not None:
            parts.append(f"majority-answer baseline (no image): answer acc. {blind:.3f}")
        savings = {}
        if mmskip.applied(model.llm):
            anneal(model.llm, model.progress)
            with torch.inference_mode(False), trainer.precision_plugin.forward_context():
                savings = self._savings(model, loaders)
            parts.append(text.savings_lines(label, savings))
        parts += self.training_time()
        results = {
            "label": label,
            "stage": stage,
            "methods": model.hparams["methods"],
            "metrics": {"model": model.results, "before": self.before, "blind_answer_accuracy": blind},
            "savings": savings,
        }
        self.write(trainer, results, parts)

    def _savings(self, model: VLM, loaders: Any) -> dict[str, Any]:
        batch = model.transfer_batch_to_device(first_batch(loaders), model.device, 0)
        savings: dict[str, Any] = {"training_step": counted_savings(model, batch)}
        # with routers alone trained, a step of the model without them has nothing to train
        if self.pairs and model.hparams["trainable"] != "router":
            savings["measured"] = measured_speedup(model, batch, self.pairs)
        return savings


def _table(rows: dict[str, dict[str, float]]) -> str:
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{title:>14}" for _, title in COLUMNS) + f"{'keep':>8}"]
    for name, values in rows.items():
        cells = "".join(f"{values[key]:>14.4f}" for key, _ in COLUMNS)
        lines.append(f"{name:<{width}}{cells}{values['keep']:>8.2f}")
    return "\n".join(lines)
