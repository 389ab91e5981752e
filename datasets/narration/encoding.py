"""Features of a frozen vision tower for the videos of a data set: encoded once, with their statistics."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmskip.datasets.narration.parsing import read_json
from mmskip.datasets.video.features import (
    FeatureStore,
    encode_videos,
    features_key,
    write_statistics,
    write_tower,
)
from mmskip.datasets.video.tower import VisionTower, check_tower_name, tower_id
from mmskip.env import pick_device

EMBEDDED_TOWER: dict[str, Any] = {
    "name": "timm/vit_tiny_patch16_224",
    "image_size": 96,
    "tower_kwargs": {"depth": 1, "patch_size": 32, "embed_dim": 384, "num_heads": 6},
}
"""The tower of the embedded set: random weights, one patch per cell of the stage, one block."""
_STATISTICS_VIDEOS = 100


class TowerFeatures:
    """The features of one tower at one frame rate, below a folder.

    Args:
        folder: where features of several towers lie, each in its own folder.
        tower_args: arguments of `VisionTower`.
        fps: frames per second.

    Attributes:
        key: name of tower and rate.
        folder: of these features.
        store: reads them.
    """

    def __init__(self, folder: Path, tower_args: dict[str, Any], fps: float) -> None:
        self.tower_args, self.fps = tower_args, fps
        self.key = features_key(tower_id(**tower_args), fps)
        self.folder = folder / self.key
        self.store = FeatureStore(self.folder, self.key)
        self._tower: VisionTower | None = None
        self._dim: int | None = None

    @property
    def dim(self) -> int:
        """C, channels of a frame feature."""
        if self._dim is None:
            # read from the cache, so that a finished one needs no tower
            known = self._shape_path.exists()
            self._dim = read_json(self._shape_path)["shape"]["dim"] if known else VisionTower(**self.tower_args).dim
        return self._dim

    def require_tower(self) -> None:
        """Build the tower unless features were encoded before: one that cannot be had must fail before hundreds of
        videos are written."""
        if not self._shape_path.exists():
            self._tower = VisionTower(**self.tower_args)

    def encode(self, videos: Mapping[str, Path], device: str) -> dict[str, str]:
        """Encode the videos whose features are missing or outdated.

        Args:
            videos: file by name of its features.
            device: "auto", "cpu" or "cuda".

        Returns:
            The error of each video that could not be read, by name; such videos are left out with a warning.
        """
        if all(self.store.is_current(name, path) for name, path in videos.items()):
            return {}
        chosen = pick_device(device)
        tower, self._tower = self._tower or VisionTower(**self.tower_args), None
        write_tower(self.folder, self.tower_args, self.fps, tower.dim)
        broken = encode_videos(tower, sorted(videos.items()), self.folder, self.fps, chosen).broken
        if broken:
            names = "; ".join(list(broken.values())[:3])
            warnings.warn(f"{len(broken)} of {len(videos)} videos left out: {names}", stacklevel=3)
        return broken

    def write_statistics(self, path: Path, names: Sequence[str]) -> None:
        """Write mean and standard deviation of the first readable videos, unless the file is there: enough, and
        quick."""
        if not path.exists():
            readable = [name for name in names if self.store.is_readable(name)]
            write_statistics(path, self.store, readable[:_STATISTICS_VIDEOS])

    def count_frames(self, name: str, path: Path) -> int | None:
        """Frames of a video's features; None where they are missing, or those of the video before it broke.

        Raises:
            ValueError: they cannot be read.
        """
        if self.store.is_current(name, path):
            return self.store.count_frames(name)
        if name in self.store:
            self.store.count_frames(name)
        return None

    @property
    def _shape_path(self) -> Path:
        return self.folder / "tower.json"


def tower_arguments(
    name: str | None,
    pretrained: bool,
    grid: int,
    image_size: int | None,
    tower_kwargs: dict[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """Arguments of `VisionTower`; without a name those of the embedded set's.

    Raises:
        ValueError: settings without a tower, or an unknown tower.
    """
    if name is None and (image_size or tower_kwargs or pretrained):
        raise ValueError("image_size, tower_kwargs and tower_pretrained need a tower; name one, or omit them")
    given = {"name": name, "pretrained": pretrained, "grid": grid, "image_size": image_size}
    args = {**given, "tower_kwargs": tower_kwargs, "seed": seed, **({} if name else EMBEDDED_TOWER)}
    check_tower_name(args["name"])
    return args
