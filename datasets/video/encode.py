"""Encode the frames of a folder of videos to sharded features, by several processes.

    mmskip encode --videos VIDEOS --out FEATURES --tower open_clip/ViT-L-16-SigLIP-384/webli

Features go to FEATURES/<key>/, <key> naming tower and rate: shards (safetensors, one fp16 tensor [F, N, C] per video)
and `index.json`. A shard is written atomically; a second run resumes after the last one.
`NarrationData(features_dir=FEATURES)` reads them.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.video.features import (
    INDEX,
    EncodeReport,
    FeatureStore,
    encode_video,
    features_key,
    features_path,
    fingerprint,
    save_tensors,
    write_tower,
)
from mmskip.datasets.video.files import find_videos
from mmskip.datasets.video.reader import VideoError
from mmskip.datasets.video.tower import VisionTower, check_tower_name, tower_id
from mmskip.env import pick_device
from mmskip.utils.command import CommandParser, exit_status
from mmskip.utils.files import check_folder, write_json

MIB = 2**20
_tower: VisionTower | None = None


def encode_folder(
    videos: dict[str, Path],
    out: str | Path,
    tower_args: dict[str, Any],
    fps: float = 2.0,
    workers: int = 0,
    shard_mib: float = 512,
    device: str = "auto",
    progress: bool = True,
) -> tuple[Path, EncodeReport]:
    """Encode videos that are not in the shards of `out` yet.

    Args:
        videos: path by name.
        out: folder above that of this tower and rate.
        tower_args: of `VisionTower`.
        fps: sampling rate, frames per second, > 0.
        workers: processes that decode and encode; 0: this one alone.
        shard_mib: a shard is closed when it holds at least so much, MiB, > 0.
        device: where the towers run, see `mmskip.env.pick_device`.
        progress: show a progress bar.

    Returns:
        The folder of the features, and counts; a video that cannot be read is left out and named in `broken`.

    Raises:
        ValueError: an unknown tower or a value out of range, before anything is written.
    """
    if not fps > 0 or workers < 0 or not shard_mib > 0:
        raise ValueError(
            f"encode needs fps > 0, workers >= 0 and a shard size > 0 MiB, got {fps}, {workers} and {shard_mib}"
        )
    check_tower_name(tower_args["name"])
    key = features_key(tower_id(**tower_args), fps)
    folder = Path(out) / key
    device = str(pick_device(device))
    check_folder(folder)
    # the tower is built here first, so that one that cannot be had fails before any process starts
    tower = VisionTower(**tower_args)
    write_tower(folder, tower_args, fps, tower.dim)
    writer = _ShardWriter(folder, key, int(shard_mib * MIB))
    store = FeatureStore(folder, key)
    report = EncodeReport()
    todo = {name: path for name, path in sorted(videos.items()) if not store.is_current(name, path)}
    report.reused = len(videos) - len(todo)
    bar = tqdm(total=len(videos), initial=report.reused, desc="encoding", unit="video", disable=not progress)
    try:
        for name, features, facts in _encoded(todo, tower, tower_args, fps, workers, device):
            if features is None:
                report.broken[name] = facts["error"]
            else:
                writer.add(name, features, facts)
                report.encoded += 1
            bar.set_postfix(broken=len(report.broken))
            bar.update()
    finally:
        bar.close()
        writer.close()  # an interrupted run keeps what it has encoded
    return folder, report


class _ShardWriter:
    """Gathers features, and writes a shard and the index whenever there are enough."""

    def __init__(self, folder: Path, key: str, limit: int) -> None:
        self.folder, self.key, self.limit = folder, key, limit
        self.index = _adopted(folder, key)
        self._tensors: dict[str, torch.Tensor] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._write_index()

    def add(self, name: str, features: np.ndarray, record: dict[str, Any]) -> None:
        self._tensors[name] = torch.from_numpy(features)
        self._records[name] = record
        if sum(tensor.nbytes for tensor in self._tensors.values()) >= self.limit:
            self.close()

    def close(self) -> None:
        """Write what is there."""
        if not self._tensors:
            return
        numbers = (path.stem.rpartition("-")[2] for path in self.folder.glob("shard-*.safetensors"))
        shard = f"shard-{max(map(int, numbers), default=-1) + 1:05d}.safetensors"
        metadata = {"key": self.key, "videos": json.dumps(self._records)}
        save_tensors(self.folder / shard, self._tensors, metadata)
        self.index.update({name: {"shard": shard, **record} for name, record in self._records.items()})
        self._write_index()
        for name in self._records:
            # a separate file would go before the shard; here it is one of a video that has changed since
            features_path(self.folder, name).unlink(missing_ok=True)
        self._tensors, self._records = {}, {}

    def _write_index(self) -> None:
        write_json({"key": self.key, "videos": self.index}, self.folder / INDEX)


def _adopted(folder: Path, key: str) -> dict[str, dict[str, Any]]:
    """The index made anew from the shards that are there and readable: a run may have stopped before it wrote its own,
    and a shard may have been lost."""
    index: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError:
            continue
        if metadata.get("key") == key:
            records = json.loads(metadata["videos"])
            index.update({name: {"shard": path.name, **record} for name, record in records.items()})
    return index


def _encoded(
    todo: dict[str, Path], tower: VisionTower, tower_args: dict[str, Any], fps: float, workers: int, device: str
) -> Iterator[tuple[str, np.ndarray | None, dict[str, Any]]]:
    """(name, features or None, record or error) of each video, as they are finished."""
    global _tower
    if workers == 0 or not todo:
        _tower = tower.to(device)
        yield from (_encode_one(name, path, fps) for name, path in todo.items())
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    threads = max(1, (os.cpu_count() or 1) // workers)
    waiting = iter(todo.items())
    with ProcessPoolExecutor(workers, context, _start_worker, (tower_args, device, threads)) as pool:
        running: set[Future[Any]] = set()
        try:
            while True:
                # a few ahead: finished features wait in memory
                for name, path in waiting:
                    running.add(pool.submit(_encode_one, name, path, fps))
                    if len(running) >= workers + 2:
                        break
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_worker(tower_args: dict[str, Any], device: str, threads: int) -> None:
    global _tower
    torch.set_num_threads(threads)
    _tower = VisionTower(**tower_args).to(device)


def _encode_one(name: str, path: Path, fps: float) -> tuple[str, np.ndarray | None, dict[str, Any]]:
    assert _tower is not None
    try:
        features, duration_s = encode_video(_tower, path, fps)
    except VideoError as error:
        return name, None, {"error": str(error)}
    return name, features.numpy(), {"content": fingerprint(path), "duration_s": duration_s, "frames": len(features)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--videos", required=True, help="folder of videos, at any depth; named by their file names")
    parser.add_argument("--out", required=True, help="folder of the features")
    parser.add_argument("--tower", required=True, help="timm/<model> or open_clip/<model>[/<pretrained tag>]")
    parser.add_argument("--pretrained", action="store_true", help="load the tower's published weights (timm)")
    parser.add_argument("--grid", type=int, default=3, help="pooled tokens per side (default 3: 1 + 9 tokens a frame)")
    parser.add_argument("--image_size", type=int, help="pixels (default: the tower's own)")
    parser.add_argument("--tower_kwargs", type=json.loads, help="further arguments of the tower, as JSON")
    parser.add_argument("--tower_seed", type=int, default=0, help="of random weights")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second (default 2)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default 0: this one alone)")
    parser.add_argument("--shard_size", type=float, default=512, help="MiB of features per shard (default 512)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a video could not be read")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m mmskip.datasets.video.encode") -> int:
    """Run the command; returns the exit status: 2 for wrong arguments or videos.

    Args:
        arguments: without the program's name; None: those of the process.
        prog: command as typed, for the help.
    """
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return exit_status(lambda: run(parser.parse_args(arguments)))


def run(given: argparse.Namespace) -> int:
    """Encode, print the counts; returns the exit status.

    Raises:
        ValueError: wrong arguments, or no videos.
    """
    tower_args = {
        "name": given.tower,
        "pretrained": given.pretrained,
        "grid": given.grid,
        "image_size": given.image_size,
        "tower_kwargs": given.tower_kwargs,
        "seed": given.tower_seed,
    }
    if not Path(given.videos).is_dir():
        raise ValueError(f"{given.videos}: no such folder of videos")
    twice = LoadReport()
    videos = find_videos(Path(given.videos), twice)
    if not videos:
        raise ValueError(f"{given.videos}: holds no video file")
    folder, report = encode_folder(
        videos, given.out, tower_args, given.fps, given.workers, given.shard_size, given.device
    )
    print(f"{folder}: {report.encoded} videos encoded, {report.reused} there already, {len(report.broken)} broken")
    if twice.counts:
        print(f"left out: {twice}")
    for message in report.broken.values():
        print(f"  broken: {message}")
    return 1 if given.strict and (report.broken or twice.counts) else 0


if __name__ == "__main__":
    sys.exit(main())
