"""The DataModule of streaming narration: the embedded generated set, or annotated videos of any known format."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmskip.datasets.common.module import BaseData
from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.narration.encoding import TowerFeatures, tower_arguments
from mmskip.datasets.narration.index import check_format, load_narrations
from mmskip.datasets.narration.parsing import NarratedVideo
from mmskip.datasets.narration.tokenizer import StreamTokens, prepare_tokenizer, train_tokenizer
from mmskip.datasets.narration.turns import collate_narration, plan_turns, split_turns
from mmskip.datasets.narration.windows import Entry, NarrationDataset, check_sources
from mmskip.datasets.synthetic.videos import GeneratedConfig, generate
from mmskip.datasets.video.features import read_statistics
from mmskip.datasets.video.files import find_videos
from mmskip.datasets.video.reader import read_video
from mmskip.utils.files import atomic_path
from mmskip.utils.pretrained import pretrained

_EMBEDDED = GeneratedConfig()
PICTURE_SIZE = 224


class NarrationData(BaseData):
    """Streaming narration of videos: batches of `collate_narration`.

    Without `annotations` it is the embedded set, written under `root` on first use. Features of the frozen tower are
    encoded once; tokenizer and features are kept under `root` as well.

    Args:
        root: folder for everything that is made here.
        generated: settings of the embedded set.
        annotations: annotation file per split ("train", "val", "test"); splits may be missing. Without "train" a
            `tokenizer` must be given.
        video_dir: folder of videos, one for all splits or one per split; with `annotations` only.
        format: of the annotations, see `mmskip.datasets.narration.index`; "auto": found out per file.
        narration_passes: annotators (or levels) to use; None: the format's first.
        narrate_at: when a segment is narrated: "end", "start" or "spoken"; None: when it was spoken where that is
            known, else at its end.
        redactions: Ego4D's metadata file `ego4d.json`, whose redacted intervals are left out.
        features_dir: folder of features, as `python -m mmskip.datasets.video.encode` fills it (`--out`); None: under
            `root`. Videos whose features lie there need not exist.
        tower: `timm/...` or `open_clip/...`; None: the embedded set's small random tower, of given size and
            arguments.
        tower_pretrained, grid, image_size, tower_kwargs, tower_seed: as for `VisionTower`.
        encode_device: where the tower runs: "auto" (cuda if there is one), "cpu", "cuda".
        tokenizer: name or folder of a Hugging Face tokenizer; None: a word-level one over the training narrations.
        fps: sampling rate, frames per second, > 0.
        batch_size, eval_batch_size: samples per batch and rank, in training and else (None: the same).
        num_workers: loader processes.
        max_frames, max_tokens: longest sample; longer videos are cut into several at turn borders.
        min_words: shortest narration used, words.
        padding_side: "right" or "left".
        instruction: text put after `<bos>` in every sample.
        blank: replace features by zeros (control).
        seed: of the order of training samples.

    Raises:
        ValueError: contradicting or impossible arguments, an unknown tower, missing files; before work starts.
    """

    def __init__(
        self,
        root: str = "data",
        generated: GeneratedConfig = _EMBEDDED,
        annotations: dict[str, str] | None = None,
        video_dir: str | dict[str, str] | None = None,
        format: str = "auto",
        narration_passes: list[str] | None = None,
        narrate_at: str | None = None,
        redactions: str | None = None,
        features_dir: str | None = None,
        tower: str | None = None,
        tower_pretrained: bool = False,
        grid: int = 3,
        image_size: int | None = None,
        tower_kwargs: dict[str, Any] | None = None,
        tower_seed: int = 0,
        encode_device: str = "auto",
        tokenizer: str | None = None,
        fps: float = 2.0,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        max_frames: int | None = None,
        max_tokens: int | None = None,
        min_words: int = 2,
        padding_side: str = "right",
        instruction: str = "",
        blank: bool = False,
        seed: int = 0,
    ) -> None:
        _check_batches(padding_side, fps, batch_size)
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.tower_args = tower_arguments(tower, tower_pretrained, grid, image_size, tower_kwargs, tower_seed)
        self.generated, self.annotations = generated, annotations
        self.video_dir = check_sources(annotations, video_dir)
        self.source = _source(format, narration_passes, narrate_at, redactions)
        self.encode_device, self.tokenizer_name = encode_device, tokenizer
        self.fps = fps
        self.max_frames, self.max_tokens, self.min_words = max_frames, max_tokens, min_words
        self.padding_side, self.instruction = padding_side, instruction
        self.blank = blank
        self.folder = Path(root) / (f"embedded-{generated.id}" if annotations is None else "narrated")
        self.features_dir = features_dir
        self.features = TowerFeatures(Path(features_dir or self.folder / "features"), self.tower_args, fps)
        self.features_key, self.store = self.features.key, self.features.store
        self.counts: dict[str, Counter[str]] = {}
        self.reports: dict[str, LoadReport] = {}
        self.broken: dict[str, str] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._datasets: dict[str, NarrationDataset] = {}
        if annotations is not None and tokenizer is None and "train" not in annotations:
            self._check_tokenizer()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The prepared tokenizer. Loaded, or trained on the training narrations; needs no videos."""
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        return self._tokenizer

    @property
    def tokens(self) -> StreamTokens:
        """The tokenizer's stream tokens."""
        return StreamTokens.of(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs for all tokens, added ones included."""
        return len(self.tokenizer)

    @property
    def feature_dim(self) -> int:
        """C, channels of a frame feature."""
        return self.features.dim

    @property
    def features_folder(self) -> Path:
        """Folder of the features of this tower and frame rate."""
        return self.features.folder

    @property
    def frame_tokens(self) -> int:
        """N, tokens per frame."""
        return 1 + self.tower_args["grid"] ** 2

    def feature_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [C] of the training features, after `prepare_data`. A model standardises by them
        (and keeps them in its checkpoint): the tokens of a tower share a large common part."""
        return read_statistics(self._statistics_path)

    def prepare_data(self) -> None:
        """Generate, encode and write the tokenizer, as far as not done yet. Lightning calls it on one rank."""
        self.features.require_tower()
        if self.tokenizer_name is not None:
            self._tokenizer = self._make_tokenizer()
        if self.annotations is None:
            generate(self.folder, self.generated)
        splits = [split for split in SPLITS if self.has(split)]
        videos = {self._feature_name(s, video.uid): video.path for s in splits for video in self._load(s)}
        self.broken = self.features.encode(videos, self.encode_device) or self.broken
        if not self._statistics_path.exists():
            self.features.write_statistics(self._statistics_path, self._statistics_names())
        folder = self._tokenizer_folder
        if self.tokenizer_name is None and not folder.exists():
            with atomic_path(folder) as partial:
                self.tokenizer.save_pretrained(partial)

    def setup(self, stage: str | None = None) -> None:
        """Read narrations and plan the samples of the splits a stage needs ("fit", "validate", "test", "predict")."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in needed.get(stage or "", SPLITS):
            if self.has(split) and split not in self._datasets:
                self._datasets[split] = self._dataset(split)

    def val_dataloader(self) -> DataLoader:
        """Validation batches, in order.

        Raises:
            ValueError: there is no such split.
        """
        return self.in_order(self.dataset("val"), self.collate_of("val"))

    def predicted_split(self) -> str:
        """Test."""
        return "test"

    def collate_of(self, split: str) -> Callable[[Any], Any]:
        """Collate samples of `build_sample`, see `collate_narration`."""
        return partial(collate_narration, pad_token_id=self.tokens.pad, padding_side=self.padding_side)

    def dataset(self, split: str) -> NarrationDataset:
        """The samples of a split, after `prepare_data`.

        Raises:
            ValueError: the split has no annotations.
        """
        if not self.has(split):
            raise ValueError(f"no annotations for split {split!r}; given: {sorted(self.annotations or {})}")
        if split not in self._datasets:
            self._datasets[split] = self._dataset(split)
        return self._datasets[split]

    def frames(self, uid: str, limit: int) -> np.ndarray:
        """The first `limit` frames of the sample `uid`, uint8 [F, S, S, 3], cut as the tower sees them: for pictures.

        Raises:
            ValueError: no split that was set up has the sample, or its video cannot be read any more.
        """
        entries = {entry.uid: entry for dataset in self._datasets.values() for entry in dataset.entries}
        if uid not in entries:
            raise ValueError(f"no sample {uid!r} in the splits {sorted(self._datasets)}")
        entry = entries[uid]
        limit = min(limit, entry.turns[-1].frames[1] - entry.first_frame)
        start_s = entry.first_frame / self.fps
        size = self.tower_args["image_size"] or PICTURE_SIZE
        return read_video(entry.path, self.fps, size, start_s, start_s + limit / self.fps).frames[:limit]

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return self.annotations is None or split in self.annotations

    def _load(self, split: str) -> list[NarratedVideo]:
        if not self.has(split):
            return []
        if self.annotations is None:
            source, videos = self.folder / split / "narrations.json", self.folder / split / "videos"
        else:
            source, videos = Path(self.annotations[split]), Path(self.video_dir[split])
        loaded, report = load_narrations(source, videos, check_videos=False, encoded=self._encoded, **self.source)
        self.counts[split], self.reports[split] = Counter(report.counts), report
        return loaded

    def _feature_name(self, split: str, uid: str) -> str:
        """Name of a video's features: its uid, with the split where another split has another file of that name."""
        if self.annotations is None:
            return uid
        own = self._files.get(self.video_dir[split], {}).get(uid)
        others = {files[uid] for files in self._files.values() if uid in files}
        return uid if own is None or others == {own} else f"{uid}@{split}"

    @property
    def _encoded(self) -> set[str]:
        """Videos that need no file. Under `root` features are only a cache: there a missing video is missing."""
        return self.store.names() if self.features_dir is not None else set()

    @cached_property
    def _files(self) -> dict[str, dict[str, Path]]:
        """The video files of each folder."""
        return {folder: find_videos(Path(folder)) for folder in set(self.video_dir.values())}

    def _dataset(self, split: str) -> NarrationDataset:
        entries: list[Entry] = []
        tokens = self.tokens
        videos = self._load(split)
        counts = self.counts[split]
        for video in videos:
            features = self._feature_name(split, video.uid)
            frames = self._count_frames(split, video.uid, video.path)
            if frames is None:
                continue
            turns, dropped = plan_turns(video.narrations, self.fps, frames, self.min_words)
            samples, cut = split_turns(
                turns, tokens, self.frame_tokens, self.max_frames, self.max_tokens, self.instruction
            )
            counts.update(dropped)
            counts.update(cut)
            name = video.uid if len(self.source["passes"] or ()) < 2 else f"{video.uid}/{video.annotator}"
            for number, sample in enumerate(samples):
                uid = name if len(samples) == 1 else f"{name}#{number}"
                entries.append(Entry(uid, features, tuple(sample), video.path, self.instruction))
        if not entries:
            raise ValueError(f"split {split!r} has no usable sample ({dict(counts)}); run prepare_data first")
        if counts:
            report = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
            rank_zero_info(f"{split}: {len(entries)} samples; left out or changed: {report}")
        return NarrationDataset(entries, self.store, tokens, self.blank)

    def _count_frames(self, split: str, uid: str, path: Path) -> int | None:
        """Frames of a video's features; None, and counted, where they are missing, cannot be read, or are those of the
        video before it broke."""
        try:
            frames = self.features.count_frames(self._feature_name(split, uid), path)
        except ValueError as error:
            self.counts[split]["corrupt features"] += 1
            self.broken[uid] = str(error)
            return None
        if frames is None:
            self.counts[split]["corrupt video"] += 1
        return frames

    @property
    def _statistics_path(self) -> Path:
        return self.features.folder / f"statistics{self._data_id}"

    def _statistics_names(self) -> list[str]:
        """Features of the training videos (of the first split there is, without training)."""
        split = next(split for split in SPLITS if self.has(split))
        return [self._feature_name(split, video.uid) for video in self._load(split)]

    @property
    def _data_id(self) -> str:
        """Ending for the files that depend on the annotations: others have other words and other videos."""
        if self.annotations is None:
            return ""
        files = [(split, path, Path(path).stat().st_size) for split, path in sorted(self.annotations.items())]
        return f"-{sha256(repr((files, self.source['passes'])).encode()).hexdigest()[:10]}"

    @property
    def _tokenizer_folder(self) -> Path:
        return self.folder / f"tokenizer{self._data_id}"

    def _check_tokenizer(self) -> None:
        if not self._tokenizer_folder.exists():
            raise ValueError(
                f"annotations has {sorted(self.annotations or {})} and no 'train', whose words the tokenizer is made "
                "of; give tokenizer=FOLDER (a training run has its own in <run>/tokenizer), or training annotations"
            )

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer_name is not None:
            return prepare_tokenizer(pretrained("tokenizer", self.tokenizer_name, AutoTokenizer.from_pretrained))
        if self._tokenizer_folder.exists():
            return AutoTokenizer.from_pretrained(self._tokenizer_folder)
        if self.annotations is None:
            texts: Iterator[str] = self.generated.texts("train")
        else:
            texts = (item.text for video in self._load("train") for item in video.narrations)
        return prepare_tokenizer(train_tokenizer(texts))


def _check_batches(padding_side: str, fps: float, batch_size: int) -> None:
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
    if not fps > 0 or batch_size < 1:
        raise ValueError(f"fps must be > 0 and batch_size >= 1, got fps={fps}, batch_size={batch_size}")


def _source(format: str, passes: list[str] | None, narrate_at: str | None, redactions: str | None) -> dict[str, Any]:
    """Settings of the annotation reader: arguments of `load_narrations`.

    Raises:
        ValueError: a format, pass or moment that is not known.
    """
    check_format(format, passes, narrate_at)
    return {
        "format": format,
        "passes": tuple(passes) if passes else None,
        "narrate_at": narrate_at,
        "redactions": redactions,
    }
