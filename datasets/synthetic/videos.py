"""The embedded narrated-video set: real mp4 files with Ego4D-format narrations, made on first use.

Every split has its own random numbers. The texts and their times can only be known from the frames: objects, times,
places and events are random, and nothing repeats between videos. See `mmskip.datasets.synthetic.world` for the worlds.

Layout of the folder:

    manifest.json                   the settings, written first
    <split>/videos/<uid>.mp4
    <split>/narrations.json         Ego4D format, written last: it marks a finished split
"""

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.synthetic.render import draw_world
from mmskip.datasets.synthetic.world import SceneConfig, World, plan_world
from mmskip.datasets.video.reader import write_video
from mmskip.utils.files import write_json

_FORMAT = 3  # raised when the same settings give other videos


@dataclass(frozen=True)
class GeneratedConfig:
    """Settings of a generated set.

    Attributes:
        train, val, test: videos per split, >= 1.
        seed: of all random numbers, >= 0.
        image_size: side of the square frames, pixels, even, >= 32.
        fps: ticks per second: events are planned on this grid. Sample the videos at the same rate.
        frames_per_tick: frames of the file per tick; the file's rate is fps * frames_per_tick.
        crf: x264's rate factor of the files, 0..51.
        scene: difficulty.
    """

    train: int = 800
    val: int = 40
    test: int = 40
    seed: int = 0
    image_size: int = 96
    fps: float = 2.0
    frames_per_tick: int = 2
    crf: int = 23
    scene: SceneConfig = field(default_factory=SceneConfig)

    def __post_init__(self) -> None:
        for name in ("train", "val", "test", "frames_per_tick"):
            if getattr(self, name) < 1:
                raise ValueError(f"GeneratedConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"GeneratedConfig.seed must be >= 0, got {self.seed}")
        if self.image_size < 32 or self.image_size % 2:
            raise ValueError(f"GeneratedConfig.image_size must be even and >= 32, got {self.image_size}")
        if not self.fps > 0:
            raise ValueError(f"GeneratedConfig.fps must be > 0, got {self.fps}")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"GeneratedConfig.crf must be in 0..51, got {self.crf}")

    @property
    def id(self) -> str:
        """Ten characters that name these settings, for folders."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return sha256(text.encode()).hexdigest()[:10]

    def texts(self, split: str) -> Iterator[str]:
        """The narrations of a split, without writing anything."""
        for index in range(getattr(self, split)):
            yield from (item.text for item in world_of(self, split, index).narrations)


def generate(
    root: str | Path, config: GeneratedConfig | None = None, workers: int | None = None, progress: bool = True
) -> Path:
    """Write the set into a folder; existing files are kept, so an interrupted run continues.

    Args:
        root: the set's folder, new or of the same settings.
        config: the settings; None: the defaults.
        workers: processes; None: one per core, 0: none but this one.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds a set of other settings.
    """
    root, config = Path(root), config or GeneratedConfig()
    manifest = {"format": _FORMAT, **asdict(config)}
    manifest = json.loads(json.dumps(manifest))
    path = root / "manifest.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != manifest:
            differing = sorted(key for key in {*found, *manifest} if found.get(key) != manifest.get(key))
            raise ValueError(
                f"{root} holds a generated set of other settings ({', '.join(differing)} differ); "
                "give another folder, or delete this one"
            )
    else:
        write_json(manifest, path)
    open_splits = [split for split in SPLITS if not (root / split / "narrations.json").exists()]
    jobs = [
        (split, index)
        for split in open_splits
        for index in range(getattr(config, split))
        if not _video_path(root, split, index).exists()
    ]
    with tqdm(total=len(jobs), desc="generating videos", unit="video", disable=not progress or not jobs) as bar:
        for _ in _run(partial(_write_one, root, config), jobs, workers):
            bar.update()
    for split in open_splits:
        write_json(_narrations(config, split), root / split / "narrations.json")
    return root


def world_of(config: GeneratedConfig, split: str, index: int) -> World:
    """The world of a video of the set: the ground truth of its narrations."""
    return plan_world(config.scene, _generators(config, split, index)[0])


def video_uid(split: str, index: int) -> str:
    """Name of a video of the set."""
    return f"{split}-{index:05d}"


def _video_path(root: Path, split: str, index: int) -> Path:
    return root / split / "videos" / f"{video_uid(split, index)}.mp4"


def _generators(config: GeneratedConfig, split: str, index: int) -> list[np.random.Generator]:
    """Independent generators of one video: for its plan, its looks and its narration times."""
    seeds = np.random.SeedSequence([config.seed, SPLITS.index(split), index]).spawn(3)
    return [np.random.default_rng(seed) for seed in seeds]


def _write_one(root: Path, config: GeneratedConfig, job: tuple[str, int]) -> None:
    plan, looks, _ = _generators(config, *job)
    frames = draw_world(plan_world(config.scene, plan), config.image_size, config.frames_per_tick, looks)
    write_video(_video_path(root, *job), frames, config.fps * config.frames_per_tick, config.crf)


def _run(function: Any, jobs: list[tuple[str, int]], workers: int | None) -> Iterator[None]:
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 2 or len(jobs) < 8:
        yield from map(function, jobs)
        return
    # Forked workers need no second import of torch; they run numpy and x264 only.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(function, job) for job in jobs]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _narrations(config: GeneratedConfig, split: str) -> dict[str, Any]:
    """The split's narrations in Ego4D's format. Times lie a little before the frame that shows the event."""
    videos = {}
    for index in range(getattr(config, split)):
        uid = video_uid(split, index)
        plan, _, times = _generators(config, split, index)
        narrations = []
        for number, item in enumerate(plan_world(config.scene, plan).narrations):
            seconds = round((item.tick - float(times.uniform(0, 0.8))) / config.fps, 4)
            narrations.append(
                {
                    "timestamp_sec": seconds,
                    "timestamp_frame": int(seconds * config.fps * config.frames_per_tick),
                    "_unmapped_timestamp_sec": seconds,
                    "narration_text": item.text,
                    "annotation_uid": f"{uid}-{number}",
                }
            )
        videos[uid] = {
            "narration_pass_1": {"narrations": narrations, "summaries": []},
            "status": "complete",
        }
    return {"version": f"generated-{_FORMAT}", "description": "mmskip generated set", "videos": videos}
