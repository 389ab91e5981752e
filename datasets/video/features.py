"""Frame features of a frozen tower, encoded once to disk and read back during training.

Features lie in a folder named by tower and rate, so that those of another tower, input size or rate are never mixed:
fp16 [F, N, C] per video, either one safetensors file per video (`encode_videos`) or shards of many
(`python -m mmskip.datasets.video.encode`). A `FeatureStore` reads both.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from mmskip.datasets.video.reader import VideoError, VideoStream
from mmskip.datasets.video.tower import VisionTower
from mmskip.utils.files import atomic_path, write_json

INDEX = "index.json"
_SHARD = re.compile(r"shard-\d+")
_TENSOR = "features"
_EDGE = 1 << 16  # bytes at both ends of a video that go into its fingerprint


@dataclass
class EncodeReport:
    """The outcome of an encoding run.

    Attributes:
        encoded, reused: videos encoded now, and found in the cache.
        broken: message per video that could not be read.
    """

    encoded: int = 0
    reused: int = 0
    broken: dict[str, str] = field(default_factory=dict)


def features_key(tower_id: str, fps: float) -> str:
    """Name of the cache folder for a tower (`VisionTower.features_id`) and a rate in frames per second."""
    return sha256(json.dumps([tower_id, float(fps)]).encode()).hexdigest()[:16]


def features_path(folder: str | Path, name: str) -> Path:
    """The file of one video that is not in a shard."""
    return Path(folder) / f"{name}.safetensors"


def fingerprint(video: Path) -> str:
    """Sixteen characters of a file's size and of the bytes at both ends: equal for equal videos, quick for long."""
    size = video.stat().st_size
    with video.open("rb") as file:
        head = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        return sha256(b"%d" % size + head + file.read()).hexdigest()[:16]


class FeatureStore:
    """The features of one tower and rate in one folder, whatever files they lie in.

    Args:
        folder: of the features; need not exist yet.
        key: the expected `features_key`; None: not checked.
    """

    def __init__(self, folder: str | Path, key: str | None = None) -> None:
        self.folder, self.key = Path(folder), key
        self._shards: dict[str, dict[str, Any]] | None = None

    @property
    def shards(self) -> dict[str, dict[str, Any]]:
        """Record of each video in a shard: `shard` (file name), `content` (`fingerprint`), `duration_s`.

        Raises:
            ValueError: an unreadable index, or one of another tower or rate.
        """
        if self._shards is None:
            self._shards = read_index(self.folder, self.key)
        return self._shards

    def names(self) -> set[str]:
        """The videos whose features are here."""
        files = {path.stem for path in self.folder.glob("*.safetensors")}
        return {name for name in files if not _SHARD.fullmatch(name)} | set(self.shards)

    def __contains__(self, name: str) -> bool:
        return features_path(self.folder, name).exists() or name in self.shards

    def is_current(self, name: str, video: Path) -> bool:
        """Whether the features are those of this video. A video that is gone counts as unchanged: its features are
        what is left."""
        if not self.is_readable(name):
            return False
        with self._open(name) as (file, tensor):
            metadata = file.metadata() or {}
        if self.key is not None and metadata.get("key") != self.key:
            return False
        if not video.exists():
            return True
        if tensor != _TENSOR:
            return self.shards[name]["content"] == fingerprint(video)
        same_size = metadata.get("bytes") == str(video.stat().st_size)
        # files of earlier versions know the size only
        return same_size and metadata.get("content", fingerprint(video)) == fingerprint(video)

    def is_readable(self, name: str) -> bool:
        """Whether the features are here and complete."""
        if name not in self:
            return False
        try:
            self.count_frames(name)
        except ValueError:
            return False
        return True

    def content(self, name: str) -> str:
        """The mark that distinguishes a video's features from those of another of the same name: its `fingerprint`; its
        size, in files of earlier versions.

        Raises:
            ValueError: missing or unreadable.
        """
        with self._open(name) as (file, tensor):
            if tensor != _TENSOR:
                return self.shards[name]["content"]
            metadata = file.metadata() or {}
        return metadata.get("content") or metadata.get("bytes") or ""

    def read(self, name: str, frames: slice = slice(None)) -> Tensor:
        """The features of one video, float32 [F, N, C]; frames outside the slice are not touched.

        Raises:
            ValueError: missing, unreadable, or made by another tower or at another rate.
        """
        with self._open(name) as (file, tensor):
            found = (file.metadata() or {}).get("key")
            if self.key is not None and found != self.key:
                raise ValueError(
                    f"features of {name!r} in {self.folder} are {found}, not {self.key}: another tower, size or rate "
                    "made them; delete them"
                )
            return file.get_slice(tensor)[frames].float()

    def count_frames(self, name: str) -> int:
        """Number of frames of a video, without reading its features.

        Raises:
            ValueError: missing or unreadable.
        """
        with self._open(name) as (file, tensor):
            return file.get_slice(tensor).get_shape()[0]

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[Any, str]]:
        """The open file of a video, and the name of its tensor. A separate file goes before a shard: it is newer."""
        path, tensor = features_path(self.folder, name), _TENSOR
        if not path.exists() and name in self.shards:
            path, tensor = self.folder / self.shards[name]["shard"], name
        try:
            with safe_open(str(path), "pt") as file:
                yield file, tensor
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable feature file ({error}); delete it and encode again") from error


def read_index(folder: Path, key: str | None = None) -> dict[str, dict[str, Any]]:
    """The videos in the shards of a folder, see `FeatureStore.shards`; empty where there is no index.

    Raises:
        ValueError: an unreadable index, or one of another tower or rate.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        found, videos = content["key"], content["videos"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable feature index ({error!r}); encode again to mend it") from error
    if key is not None and found != key:
        raise ValueError(f"{path} lists features {found}, not {key}: another tower, size or rate made them")
    return videos


def encode_videos(
    tower: VisionTower,
    videos: Sequence[tuple[str, Path]],
    folder: str | Path,
    fps: float,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> EncodeReport:
    """Encode the frames of videos that are not in the cache yet, one atomically written file each. A second run
    resumes.

    Args:
        tower: the frozen tower; moved to `device`.
        videos: name and path of each.
        folder: the cache of this tower and rate (`features_key`).
        fps: sampling rate, frames per second.
        device: where the tower runs.
        progress: show a progress bar.

    Returns:
        Counts; a video that cannot be read is left out and named in `broken`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key = features_key(tower.features_id, fps)
    store = FeatureStore(folder, key)
    report = EncodeReport()
    todo = []
    for name, path in dict(videos).items():
        if store.is_current(name, path):
            report.reused += 1
        else:
            todo.append((name, path))
    tower = tower.to(device)
    for name, path in tqdm(todo, desc="encoding frames", unit="video", disable=not progress or not todo):
        try:
            features, duration_s = encode_video(tower, path, fps)
        except VideoError as error:
            report.broken[name] = str(error)
            continue
        metadata = {"key": key, "duration_s": repr(duration_s), "bytes": str(path.stat().st_size)}
        save_tensors(features_path(folder, name), {_TENSOR: features}, metadata | {"content": fingerprint(path)})
        report.encoded += 1
    return report


def encode_video(tower: VisionTower, path: Path, fps: float) -> tuple[Tensor, float]:
    """Features of one video, fp16 [F, N, C] on the CPU, and its length in seconds.

    Raises:
        VideoError: it cannot be read.
    """
    stream = VideoStream(path, fps, tower.image_size)
    device = next(tower.parameters()).device
    chunks = [tower(torch.from_numpy(frames).to(device).permute(0, 3, 1, 2)).half().cpu() for frames in stream]
    return torch.cat(chunks).contiguous(), stream.info.duration_s


def write_statistics(path: str | Path, store: FeatureStore, names: Sequence[str]) -> None:
    """Mean and standard deviation of every channel over all frames and tokens of some videos, to a file.

    Raises:
        ValueError: no videos.
    """
    if not names:
        raise ValueError("feature statistics need at least one feature file, got none")
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for name in names:
        rows = store.read(name).flatten(0, 1).double()
        count, total, square = count + len(rows), total + rows.sum(0), square + rows.square().sum(0)
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    # A channel that never varies is left near zero instead of being blown up.
    save_tensors(Path(path), {"mean": mean.float(), "std": std.float().clamp(min=1e-3)}, {})


def read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] from `write_statistics`.

    Raises:
        ValueError: missing or unreadable.
    """
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: no readable feature statistics ({error}); run prepare_data first") from error
    return tensors["mean"], tensors["std"]


def write_tower(folder: Path, tower_args: dict[str, Any], fps: float, dim: int) -> None:
    """Write `tower.json` into a feature folder: what made the features, and their channels."""
    content = {"tower": tower_args, "fps": fps, "shape": {"dim": dim}}
    write_json(content, folder / "tower.json")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path) as partial:
        save_file(tensors, str(partial), metadata=metadata)
