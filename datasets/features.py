"""Frame features of a frozen tower, encoded once to disk and read back during training.

One safetensors file per video, fp16 [F, N, C], in a folder named by tower and rate: features of another tower, input
size or rate lie in another folder and are never mixed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from mmskip.datasets.video import VideoError, VideoStream
from mmskip.files import whole
from mmskip.models.vision_tower import VisionTower

_TENSOR = "features"


@dataclass
class EncodeReport:
    """What `encode_videos` did.

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


def features_path(folder: str | Path, uid: str) -> Path:
    """The file of one video."""
    return Path(folder) / f"{uid}.safetensors"


def encode_videos(
    tower: VisionTower,
    videos: Sequence[tuple[str, Path]],
    folder: str | Path,
    fps: float,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> EncodeReport:
    """Encode the frames of videos that are not in the cache yet. Each file is written whole; a second run goes on.

    Args:
        tower: the frozen tower; moved to `device`.
        videos: uid and path of each.
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
    report = EncodeReport()
    todo = []
    for uid, path in dict(videos).items():
        if is_current(features_path(folder, uid), key, path):
            report.reused += 1
        else:
            todo.append((uid, path))
    tower = tower.to(device)
    for uid, path in tqdm(todo, desc="encoding frames", unit="video", disable=not progress or not todo):
        try:
            stream = VideoStream(path, fps, tower.image_size)
            chunks = [tower(torch.from_numpy(frames).to(device).permute(0, 3, 1, 2)).half().cpu() for frames in stream]
        except VideoError as error:
            report.broken[uid] = str(error)
            continue
        metadata = {"key": key, "duration_s": repr(stream.info.duration_s), "bytes": str(path.stat().st_size)}
        _save(features_path(folder, uid), {_TENSOR: torch.cat(chunks).contiguous()}, metadata)
        report.encoded += 1
    return report


def read_features(path: str | Path, key: str | None = None, frames: slice = slice(None)) -> Tensor:
    """The features of one video, float32 [F, N, C].

    Args:
        path: from `features_path`.
        key: the expected `features_key`; None: not checked.
        frames: the frames to read; the others are not touched.

    Raises:
        ValueError: missing, unreadable, or made by another tower or at another rate.
    """
    try:
        with safe_open(str(path), "pt") as file:
            found = (file.metadata() or {}).get("key")
            if key is not None and found != key:
                raise ValueError(
                    f"{path} holds features {found}, not {key}: another tower, size or rate made it; delete it"
                )
            return file.get_slice(_TENSOR)[frames].float()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable feature file ({error}); delete it and encode again") from error


def write_statistics(path: str | Path, files: Sequence[Path]) -> None:
    """Mean and standard deviation of every channel over all frames and tokens of some feature files, to a file.

    Raises:
        ValueError: no files.
    """
    if not files:
        raise ValueError("feature statistics need at least one feature file, got none")
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for file in files:
        rows = read_features(file).flatten(0, 1).double()
        count, total, square = count + len(rows), total + rows.sum(0), square + rows.square().sum(0)
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    # A channel that never varies is left near zero instead of being blown up.
    _save(Path(path), {"mean": mean.float(), "std": std.float().clamp(min=1e-3)}, {})


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


def count_frames(path: str | Path) -> int:
    """Number of frames in a feature file, without reading the features."""
    with safe_open(str(path), "pt") as file:
        return file.get_slice(_TENSOR).get_shape()[0]


def is_current(cached: Path, key: str, video: Path) -> bool:
    """Whether the cache holds this video. A video that is gone counts as unchanged: its features are what is left."""
    if not cached.exists():
        return False
    try:
        with safe_open(str(cached), "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError:
        return False
    same_video = not video.exists() or metadata.get("bytes") == str(video.stat().st_size)
    return metadata.get("key") == key and same_video


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with whole(path) as partial:
        save_file(tensors, str(partial), metadata=metadata)
