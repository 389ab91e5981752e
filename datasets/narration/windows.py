"""Samples of narrated videos: the content of a split, read and tokenized on access."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.narration.tokenizer import StreamTokens
from mmskip.datasets.narration.turns import Turn, build_sample
from mmskip.datasets.video.features import FeatureStore


@dataclass(frozen=True)
class Entry:
    """One sample of a split: which turns of which video.

    Attributes:
        uid: of the sample.
        features: name of the video's features.
        turns: at least one.
        path: the video file.
        instruction: text after `<bos>`.
    """

    uid: str
    features: str
    turns: tuple[Turn, ...]
    path: Path
    instruction: str = ""

    @property
    def first_frame(self) -> int:
        """The video's frame that opens the sample."""
        return self.turns[0].frames[0] - 1


class NarrationDataset(Dataset[dict[str, Any]]):
    """Samples of one split, tokenized on access (`mmskip.datasets.narration.turns.build_sample`).

    Args:
        entries: the samples.
        store: their features.
        tokens: the tokenizer's stream tokens.
        blank: replace all features by zeros (the control that sees no video).
    """

    def __init__(self, entries: list[Entry], store: FeatureStore, tokens: StreamTokens, blank: bool = False) -> None:
        self.entries, self.store, self.tokens, self.blank = entries, store, tokens, blank

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        features = self.store.read(entry.features, slice(entry.first_frame, entry.turns[-1].frames[1]))
        if self.blank:
            features = torch.zeros_like(features)
        return build_sample(entry.turns, features, self.tokens, entry.uid, entry.first_frame, entry.instruction)


def check_sources(annotations: dict[str, str] | None, video_dir: str | dict[str, str] | None) -> dict[str, str]:
    """The video folder of every split; all files and folders must exist."""
    if annotations is None:
        if video_dir is not None:
            raise ValueError(f"video_dir={video_dir!r} needs annotations as well")
        return {}
    if unknown := set(annotations) - set(SPLITS):
        raise ValueError(f"annotations has unknown splits {sorted(unknown)}; known: {SPLITS}")
    folders = video_dir if isinstance(video_dir, dict) else dict.fromkeys(annotations, video_dir or "")
    for split, path in annotations.items():
        if not Path(path).is_file():
            raise ValueError(f"annotations[{split!r}]: no such file: {path}")
        if not folders.get(split) or not Path(folders[split]).is_dir():
            raise ValueError(f"video_dir for {split!r}: no such folder: {folders.get(split)!r}")
    return folders
