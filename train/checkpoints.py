"""Writing checkpoints whole, and finding the last one of a run."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mmskip.datasets.resumable import ResumableLoader
from mmskip.files import whole


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete, so that an interrupted save leaves
    the checkpoint before it untouched. (Lightning's own goes through a folder for temporary files, from which the
    move may be a copy.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`."""
        with whole(path) as partial:
            torch.save(checkpoint, partial)


class Resume(Callback):
    """What a run needs to go on from a checkpoint as if it had not stopped.

    Gives a training loader back its place in the epoch (see `mmskip.datasets.resumable`): Lightning stores that place,
    but forgets to restore it when a schedule has asked for the number of steps before. And saves the end of training,
    which a checkpoint every so many steps misses."""

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


def last_checkpoint(runs: Path) -> Path:
    """The newest `<runs>/*/checkpoints/last.ckpt`.

    Raises:
        ValueError: there is none.
    """
    found = sorted(runs.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            f"there is no checkpoint {runs}/*/checkpoints/last.ckpt; train first, or name another run or a file "
            "(train.py: --name, --ckpt_path; stream.py and evaluate.py: --checkpoint)"
        )
    return found[-1]
