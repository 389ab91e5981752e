"""What a run that tunes a VLM reports at its end."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

import mmskip
from mmskip.datasets.chat.batches import last_answer
from mmskip.datasets.synthetic.chat import blind_baseline
from mmskip.methods.mixture_of_depths import anneal
from mmskip.models.vlm.module import VLM
from mmskip.train.reports import text as report
from mmskip.train.savings import counted_savings, measured_speedup
from mmskip.utils.files import write_json, write_text

COLUMNS = (("loss", "loss"), ("token_accuracy", "token acc."), ("answer_accuracy", "answer acc."))


class ChatReport(Callback):
    """Prints and writes, at the end of fit, validate and test: loss and accuracies of a `VLM` beside those before
    training, and what its methods save; after predict: all answers.

    Files in the folder of the run: `report.txt`, `results.json`; `predictions.json`.

    The model before training is evaluated by Lightning's check, if that runs over the whole validation set
    (`trainer.num_sanity_val_steps: -1`). Where the keep ratio is annealed, that is the base model.

    Args:
        pairs: paired runs of a step with and without the methods for the measured speed-up; 0: not measured (it takes
            a copy of the model).
    """

    def __init__(self, pairs: int = 0) -> None:
        if pairs < 0 or pairs == 1:
            raise ValueError(f"ChatReport needs pairs 0 or >= 2, got {pairs}")
        self.pairs = pairs
        self.before: dict[str, float] = {}
        self._started = 0.0
        self._validated = 0
        self._predictions: list[dict[str, str]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot find out again."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.before = state_dict["before"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other models.

        Raises:
            ValueError: the model is no VLM.
        """
        if not isinstance(pl_module, VLM):
            raise ValueError(f"ChatReport is for VLM, the model is a {type(pl_module).__name__}")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the results of the model before training."""
        # a resumed run is checked too, but has those results from its checkpoint
        if trainer.num_sanity_val_steps == float("inf") and not self.before:
            self.before = dict(_vlm(pl_module).results)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the validation set."""
        self._report(trainer, _vlm(pl_module), "val", trainer.val_dataloaders)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step; report on the validation set, where validating is all there is to do."""
        self._validated = trainer.global_step
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._report(trainer, _vlm(pl_module), "val", trainer.val_dataloaders)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the test set."""
        self._report(trainer, _vlm(pl_module), "test", trainer.test_dataloaders)

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
        suffix = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = write_json({"predictions": found}, Path(trainer.default_root_dir) / f"predictions{suffix}.json")
        print(f"answers to {len(found)} conversations: {path}")

    def _report(self, trainer: Trainer, model: VLM, stage: str, loaders: Any) -> None:
        if not trainer.is_global_zero or not loaders or not model.results:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = {"before": self.before} if self.before and stage == "val" else {}
        name = "this model"
        if trainer.state.fn == TrainerFn.FITTING and self._validated != trainer.global_step:
            name += f" at step {self._validated} of {trainer.global_step}"
        rows[name] = model.results
        label = report.model_label(model.hparams["methods"])
        parts = [f"Results on {stage} ({model.results['answers']:.0f} answers)", _table(rows)]
        blind = blind_baseline(data.folder, stage) if data.files is None else None
        if blind is not None:
            parts.append(f"the commonest answer to each question, unseen: answer acc. {blind:.3f}")
        savings = {}
        if mmskip.applied(model.llm):
            anneal(model.llm, model.progress)
            with torch.inference_mode(False), trainer.precision_plugin.forward_context():
                savings = self._savings(model, loaders)
            parts.append(report.savings_lines(label, savings))
        if self._started:
            parts.append(f"training took {time.perf_counter() - self._started:.0f} s")
        folder = Path(trainer.default_root_dir)
        results = {
            "name": folder.parent.name,
            "label": label,
            "stage": stage,
            "methods": model.hparams["methods"],
            "metrics": {"model": model.results, "before": self.before, "blind_answer_accuracy": blind},
            "savings": savings,
        }
        path = write_json(results, folder / "results.json")
        write_text("\n\n".join(parts) + "\n", folder / "report.txt")
        print("\n\n".join(["", *parts, f"written to {path}"]))

    def _savings(self, model: VLM, loaders: Any) -> dict[str, Any]:
        batch = next(iter(loaders[0] if isinstance(loaders, list) else loaders))
        batch = model.transfer_batch_to_device(batch, model.device, 0)
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


def _vlm(module: LightningModule) -> VLM:
    assert isinstance(module, VLM)
    return module
