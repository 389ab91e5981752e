"""Writing checkpoints whole, and finding the last one of a run."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete, so that an interrupted save leaves
    the checkpoint before it untouched. (Lightning's own goes through a folder for temporary files, from which the
    move may be a copy.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            torch.save(checkpoint, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def last_checkpoint(runs: Path) -> Path:
    """The newest `<runs>/*/checkpoints/last.ckpt`.

    Raises:
        ValueError: there is none.
    """
    found = sorted(runs.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            f"there is no checkpoint {runs}/*/checkpoints/last.ckpt; train first, or give --ckpt_path FILE or --name"
        )
    return found[-1]
