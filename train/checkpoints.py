"""Atomic checkpoints, resuming, and finding the last one of a run."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mmskip.datasets.common.resumable import ResumableLoader
from mmskip.models.common.base import StepLossModule
from mmskip.utils.files import atomic_path


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete, so that an interrupted save leaves
    the checkpoint before it untouched. (Lightning's own goes through a folder for temporary files, from which the
    move may be a copy.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`."""
        with atomic_path(path) as partial:
            torch.save(checkpoint, partial)


class Resume(Callback):
    """Resumes a run from a checkpoint as if it had not stopped.

    Gives a training loader back its place in the epoch (see `mmskip.datasets.common.resumable`): Lightning stores
    that place, but forgets to restore it when a schedule has asked for the number of steps before. And saves the end
    of training, which a checkpoint every n steps misses."""

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states of the training loaders."""
        self._states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand them over, before the first batch is taken."""
        loader = trainer.train_dataloader
        if self._states and isinstance(loader, ResumableLoader):
            loader.load_state_dict(self._states[0])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state as last.ckpt, beside the run's other checkpoints."""
        saving = trainer.checkpoint_callback
        if isinstance(saving, ModelCheckpoint) and saving.dirpath is not None:
            trainer.save_checkpoint(Path(saving.dirpath) / "last.ckpt", weights_only=False)


class StartFrom(Callback):
    """Begins training with the weights of another run's checkpoint; optimizer, schedule and steps are new.

    Args:
        path: of the checkpoint.

    Raises:
        ValueError: it is no checkpoint of a run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._checkpoint = path, read_checkpoint(path)

    def check(self, model: LightningModule) -> None:
        """Refuse another model's checkpoint, before anything is written.

        Raises:
            ValueError: it is of one.
        """
        if isinstance(model, StepLossModule):
            model.check_same(self._checkpoint["hyper_parameters"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights, in place."""
        load_weights(pl_module, self._checkpoint, self.path)
        self._checkpoint = {}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of a training run.

    Raises:
        ValueError: it is none.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        _ = checkpoint["state_dict"], checkpoint["hyper_parameters"]
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a checkpoint of a training run ({reason})") from error
    return checkpoint


def load_weights(model: LightningModule, checkpoint: dict[str, Any], path: Path) -> None:
    """Load the weights of a checkpoint into a model that is built.

    Raises:
        ValueError: they are of another model.
    """
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"{path}: its weights do not fit its settings ({lines[:300]})") from error


def find_checkpoint(given: str | Path) -> Path:
    """Find the checkpoint of a path: the file, or the last one of a run (`runs/NAME/TIME`) or of all runs of a name.

    Raises:
        ValueError: no such path, or no checkpoint there.
    """
    path = Path(given)
    if path.is_dir():
        last = path / "checkpoints" / "last.ckpt"
        path = last if last.is_file() else last_checkpoint(path)
    if not path.is_file():
        raise ValueError(f"{given}: no such checkpoint; give a checkpoint file, or the folder of a run")
    return path


def last_checkpoint(runs: Path) -> Path:
    """The newest `<runs>/*/checkpoints/last.ckpt`.

    Raises:
        ValueError: there is none.
    """
    found = sorted(runs.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            f"there is no checkpoint {runs}/*/checkpoints/last.ckpt; train first, or name another run or a file "
            "(train.py: --name, --ckpt_path, --start_from; stream.py and evaluate.py: --checkpoint)"
        )
    return found[-1]
