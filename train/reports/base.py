"""The base of the reports that a run prints and writes at its end."""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from mmskip.utils.files import write_json, write_text


class RunReport(Callback, ABC):
    """Calls `report` at the end of fit, validate and test.

    Scores before training come from Lightning's check, if that runs over the full validation set
    (`trainer.num_sanity_val_steps: -1`), and are kept in checkpoints: a resumed run cannot measure them again.

    Attributes:
        model_class: the model that the report is for.
        kept: names of the attributes that checkpoints hold.
        stages: at whose end the report is made, of "fit", "validate" and "test".
    """

    model_class: ClassVar[type[LightningModule]]
    kept: ClassVar[tuple[str, ...]] = ("untrained",)
    stages: ClassVar[tuple[str, ...]] = ("fit", "validate", "test")

    def __init__(self) -> None:
        self.untrained: Any = {}
        self._started = 0.0

    @abstractmethod
    def report(self, trainer: Trainer, model: Any, stage: str) -> None:
        """Print and write the report; called on every rank.

        Args:
            trainer: of the run.
            model: a `model_class`.
            stage: the split, "val" or "test".
        """

    def scores_before(self, trainer: Trainer, model: Any) -> Any:
        """Return the scores of the untrained model, after the check over the validation set."""
        return dict(model.results)

    # --- hooks ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the values a resumed run cannot measure again."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        for name in self.kept:
            setattr(self, name, state_dict[name])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other models.

        Raises:
            ValueError: the model is no `model_class`.
        """
        if not isinstance(pl_module, self.model_class):
            name, wanted = type(self).__name__, self.model_class.__name__
            raise ValueError(f"{name} is for {wanted}, the model is a {type(pl_module).__name__}")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the scores of the untrained model."""
        # a resumed run is checked too, but has these scores from its checkpoint
        if trainer.num_sanity_val_steps == float("inf") and not self.untrained:
            self.untrained = self.scores_before(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the validation set."""
        if "fit" in self.stages:
            self.report(trainer, pl_module, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the validation set, unless validation is a part of training."""
        if "validate" in self.stages and trainer.state.fn == TrainerFn.VALIDATING:
            self.report(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the test set."""
        if "test" in self.stages:
            self.report(trainer, pl_module, "test")

    # --- for subclasses ---------------------------------------------------------------------------------------------

    def training_time(self) -> list[str]:
        """Return the line about the time of training; none where nothing was trained."""
        return [f"training took {time.perf_counter() - self._started:.0f} s"] if self._started else []

    def write(self, trainer: Trainer, results: dict[str, Any], parts: list[str]) -> None:
        """Write `results.json` and `report.txt` into the folder of the run, and print the report.

        Args:
            trainer: of the run.
            results: JSON-ready; the name of the run is put before it.
            parts: paragraphs of the report.
        """
        folder = Path(trainer.default_root_dir)
        path = write_json({"name": folder.parent.name, **results}, folder / "results.json")
        write_text("\n\n".join(parts) + "\n", folder / "report.txt")
        print("\n\n".join(["", *parts, f"written to {path}"]))


def loaders_of(trainer: Trainer, stage: str) -> Any:
    """Return the trainer's loaders of a split; None where it has none."""
    return trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders


def first_batch(loaders: Any) -> Any:
    """Return the first batch of a loader, or of the first of several."""
    return next(iter(loaders[0] if isinstance(loaders, list) else loaders))


def rank_suffix(trainer: Trainer) -> str:
    """Return the suffix of the file name of a rank's predictions; empty with one rank."""
    return f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
