"""Read frames of a video at a fixed rate, by decord with PyAV as its fallback, and write small videos.

Shapes: F frames, H height, W width. Frames are RGB uint8.
"""

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from torch.nn.functional import interpolate

from mmskip.utils.files import atomic_path

_CHUNK = 32  # frames decoded and resized at a time: bounds the memory of full-size frames


class VideoError(ValueError):
    """A video that is missing, empty, broken or asked for in an impossible way. The message says which."""


@dataclass(frozen=True)
class VideoInfo:
    """Facts from a scan of a video's packets, without decoding.

    Attributes:
        duration_s: seconds from the first frame's start to the last frame's end.
        source_fps: frames per second, averaged over the video.
        num_frames: frames in the file.
        height, width: pixels, as the video is shown: turned where its metadata say so (phones).
        stated_s: length that the file claims, seconds; 0: it claims none.
        uneven: frames shown less than half or more than twice as long as most: a variable frame rate.
    """

    duration_s: float
    source_fps: float
    num_frames: int
    height: int
    width: int
    stated_s: float = 0.0
    uneven: int = 0


@dataclass(frozen=True)
class Video:
    """Sampled frames of a video.

    Attributes:
        frames: uint8 [F, H, W, 3], RGB.
        times_s: float64 [F], the sampling times in seconds from the start of the video; the frame is the one shown
            then.
        duration_s: length of the full video, seconds.
        source_fps: average rate of the file, frames per second.
    """

    frames: np.ndarray
    times_s: np.ndarray
    duration_s: float
    source_fps: float


def sampling_times(duration_s: float, fps: float, start_s: float = 0, end_s: float | None = None) -> np.ndarray:
    """The grid start, start + 1/fps, ... below the end: float64 [F], seconds."""
    stop = duration_s if end_s is None else min(end_s, duration_s)
    return start_s + np.arange(max(math.ceil((stop - start_s) * fps - 1e-6), 0)) / fps


def video_info(path: str | Path) -> VideoInfo:
    """Length, rate and size of a video, from its packets.

    Raises:
        VideoError: missing, zero-length, truncated or not a video.
    """
    return _scan(Path(path)).info


def read_video(
    path: str | Path, fps: float, size: int | None = None, start_s: float = 0, end_s: float | None = None
) -> Video:
    """Sample a video at a fixed rate.

    The frame at time t is the one shown then, by the file's own timestamps, so variable frame rates are right. Frames
    are resized as they are decoded: only the sampled ones are held.

    Args:
        path: a file that ffmpeg reads: mp4, mkv, webm, avi, GIF, ...
        fps: samples per second, > 0; may be above the source's rate (frames repeat then).
        size: if given, the short side is resized to it and the centre size x size is cut out, pixels.
        start_s, end_s: part of the video, seconds; the end is exclusive and may lie after the video's.

    Raises:
        VideoError: missing, zero-length, truncated, not a video, fps <= 0, or nothing between start and end.
    """
    stream = VideoStream(path, fps, size, start_s, end_s)
    return Video(np.concatenate(list(stream)), stream.times_s, stream.info.duration_s, stream.info.source_fps)


class VideoStream:
    """The frames of `read_video` in chunks, for videos too long to be held: uint8 [<= 32, H, W, 3] each.

    Arguments and errors as `read_video`; the file is scanned when the stream is made and decoded as it is iterated.

    Attributes:
        info: the full file's `VideoInfo`.
        times_s: float64 [F], the sampling times.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        size: int | None = None,
        start_s: float = 0,
        end_s: float | None = None,
    ) -> None:
        if not (fps > 0 and math.isfinite(fps)):
            raise VideoError(f"fps must be a positive number of frames per second, got {fps}")
        if size is not None and size < 1:
            raise VideoError(f"size must be at least 1 pixel, got {size}")
        if start_s < 0:
            raise VideoError(f"start_s must be >= 0 s, got {start_s}")
        self.path, self.size = Path(path), size
        self._scan = _scan(self.path)
        self.info = self._scan.info
        self.times_s = sampling_times(self.info.duration_s, fps, start_s, end_s)
        if not len(self.times_s):
            raise VideoError(
                f"{path}: no frame between {start_s} s and {end_s} s; it is {self.info.duration_s:.3f} s long"
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        # The tolerance keeps a frame whose timestamp is rounded just above its grid time.
        indices = np.searchsorted(self._scan.starts_s, self.times_s + 1e-4, side="right") - 1
        wanted, repeats = np.unique(np.maximum(indices, 0), return_counts=True)
        done = 0
        for chunk in _decode(self.path, self._scan, wanted):
            frames = np.repeat(fit_square(chunk, self.size), repeats[done : done + len(chunk)], axis=0)
            done += len(chunk)
            for begin in range(0, len(frames), _CHUNK):
                yield frames[begin : begin + _CHUNK]
        if done < len(wanted):
            raise VideoError(
                f"{self.path}: broken: only {done} of {len(wanted)} frames could be decoded; "
                "copy the file again or omit it"
            )


def write_video(path: str | Path, frames: np.ndarray | Iterable[np.ndarray], fps: float, crf: int = 18) -> None:
    """Write frames as an H.264 mp4 (yuv420p). The file is written atomically.

    Args:
        path: target; its folder is made.
        frames: uint8 [F, H, W, 3], RGB, or an iterable of [H, W, 3]; H and W even.
        fps: frames per second, > 0.
        crf: x264's constant rate factor, 0 (lossless) to 51.

    Raises:
        VideoError: no frames, frames of odd or differing size or of another type, fps <= 0.
    """
    path = Path(path)
    if not fps > 0:
        raise VideoError(f"fps must be positive, got {fps}")
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise VideoError(f"{path}: no frames to write")
    if first.ndim != 3 or first.shape[2] != 3 or first.dtype != np.uint8:
        raise VideoError(f"{path}: frames must be uint8 [H, W, 3], got {first.dtype} {first.shape}")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise VideoError(
            f"{path}: yuv420p needs an even height and width, got {height}x{width}; crop or pad by a pixel"
        )
    with atomic_path(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        # With its macroblock tree x264 writes other bytes from run to run.
        exact = "threads=1:lookahead-threads=1:sync-lookahead=0:mbtree=0"
        stream.options = {"preset": "veryfast", "crf": str(crf), "x264-params": exact}
        for frame in _chain(first, iterator):
            if frame.shape != first.shape:
                raise VideoError(f"{path}: frames differ in shape: {first.shape} and {frame.shape}")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


@dataclass(frozen=True)
class _Scan:
    """Packet timestamps of a file: display order, seconds from the first frame."""

    info: VideoInfo
    starts_s: np.ndarray
    first_pts: int
    quarter_turns: int  # counter-clockwise, from the stored frame to the shown one: 0..3


def _scan(path: Path) -> _Scan:
    """Read all packets of the video stream: exact times, and whether the file is complete."""
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes)")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            packets, timeless, corrupt = _read_packets(container, stream)
            base = stream.time_base
            stated = _stated_seconds(container, stream)
            claimed = stated or (container.duration or 0) / av.time_base
            expected = stream.frames
            height, width = stream.height, stream.width
            nominal = stream.average_rate or stream.guessed_rate
    except FFmpegError as error:
        raise VideoError(f"{path}: not a readable video, or cut off ({error.strerror})") from error
    if not packets and timeless:
        raise VideoError(
            f"{path}: its {timeless} packets carry no times (a raw stream?); put them into a container, for example "
            f"by ffmpeg -r RATE -i {path.name} -c copy {path.stem}.mp4"
        )
    if not packets or base is None or not width:
        raise VideoError(f"{path}: holds no video frames; it is not a video or is cut off")
    packets.sort()
    starts = np.array([pts for pts, _ in packets], dtype=np.float64)
    starts = (starts - starts[0]) * float(base)
    step = float(np.median(np.diff(starts))) if len(starts) > 1 else float(1 / nominal) if nominal else 0.04
    duration = float(starts[-1]) + (packets[-1][1] * float(base) or step)
    # Containers round, and edit lists hide a few frames: only a plain gap means a cut file.
    slack = max(3 * step, 0.02 * stated)
    if corrupt or duration + slack < stated or len(packets) + max(3, 0.02 * expected) < expected or _cut_gif(path):
        total = f"of {expected} frames" if expected else f"frames, {duration:.2f} of {stated:.2f} s"
        raise VideoError(
            f"{path}: truncated: {_count_decodable(path)} {total} can be decoded; copy the file again or omit it"
        )
    turns = _quarter_turns(path)
    if turns % 2:
        height, width = width, height
    gaps = np.diff(starts)
    uneven = int(((gaps < 0.5 * step) | (gaps > 2 * step)).sum())
    info = VideoInfo(duration, len(starts) / duration, len(starts), height, width, claimed, uneven)
    return _Scan(info, starts, packets[0][0], turns)


def _quarter_turns(path: Path) -> int:
    """Counter-clockwise quarter turns that the metadata ask for: they come with the first frame."""
    try:
        with av.open(str(path)) as container:
            return round(next(container.decode(video=0)).rotation / 90) % 4
    except (FFmpegError, StopIteration):
        return 0  # nothing can be decoded: the error comes when frames are asked for


def _read_packets(container: Any, stream: Any) -> tuple[list[tuple[int, int]], int, bool]:
    """(pts, duration) of every packet, how many have data but no time, and whether reading ended early."""
    packets: list[tuple[int, int]] = []
    timeless, corrupt = 0, False
    try:
        for packet in container.demux(stream):
            if packet.pts is None and packet.dts is None:
                timeless += packet.size > 0
                continue
            corrupt = corrupt or packet.is_corrupt
            if not packet.is_discard:
                packets.append((packet.dts if packet.pts is None else packet.pts, packet.duration or 0))
    except FFmpegError:
        corrupt = True
    return packets, timeless, corrupt


def _stated_seconds(container: Any, stream: Any) -> float:
    """Length the header claims for the video, seconds; 0 where it claims none."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return 0.0


def _cut_gif(path: Path) -> bool:
    """Whether a GIF lacks its end mark. ffmpeg counts the frames that are there and reports nothing."""
    with path.open("rb") as file:
        if not file.read(6).startswith(b"GIF8"):
            return False
        file.seek(-min(path.stat().st_size, 64), os.SEEK_END)
        return not file.read().rstrip(b"\0").endswith(b";")


def _count_decodable(path: Path) -> int:
    count = 0
    try:
        with av.open(str(path)) as container:
            for _ in container.decode(video=0):
                count += 1
    except FFmpegError:
        pass
    return count


def _decode(path: Path, scan: _Scan, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the frames at these (ascending, distinct) indices in display order, uint8 [<= _CHUNK, H, W, 3]."""
    done = 0
    # decord turns frames by itself, but those of a quarter turn come out broken
    if importlib.util.find_spec("decord") is not None and not scan.quarter_turns:
        for chunk in _decode_decord(path, scan, wanted):
            done += len(chunk)
            yield chunk
    if done < len(wanted):
        yield from _decode_av(path, scan, wanted[done:])


def _decode_decord(path: Path, scan: _Scan, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Decode by decord; ends early, without an error, at whatever it cannot read."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        same = len(starts) == len(scan.starts_s) and np.allclose(starts - starts[0], scan.starts_s, atol=2e-3)
        if not same:
            return
        for begin in range(0, len(wanted), _CHUNK):
            yield reader.get_batch(wanted[begin : begin + _CHUNK].tolist()).asnumpy()
    except (decord.DECORDError, decord.DECORDLimitReachedError):
        return


def _decode_av(path: Path, scan: _Scan, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Decode by PyAV; ends early at a frame that cannot be decoded."""
    starts = scan.starts_s[wanted]
    chunk: list[np.ndarray] = []
    done = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            base = float(stream.time_base or 1)
            if starts[0] > 1:
                container.seek(scan.first_pts + int((starts[0] - 1) / base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None or abs((frame.pts - scan.first_pts) * base - starts[done]) > 1e-6:
                    continue
                chunk.append(np.rot90(frame.to_ndarray(format="rgb24"), scan.quarter_turns))
                done += 1
                if len(chunk) == _CHUNK or done == len(starts):
                    yield np.stack(chunk)
                    chunk = []
                if done == len(starts):
                    return
    except FFmpegError:
        pass
    if chunk:
        yield np.stack(chunk)


def fit_square(frames: np.ndarray, size: int | None) -> np.ndarray:
    """Short side to `size`, centre crop; uint8 [F, H, W, 3] in and out."""
    if size is None or frames.shape[1:3] == (size, size):
        return frames
    height, width = frames.shape[1:3]
    scale = size / min(height, width)
    target: Sequence[int] = (max(round(height * scale), size), max(round(width * scale), size))
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    images = interpolate(images, size=list(target), mode="bilinear", antialias=True, align_corners=False)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return images[:, :, top : top + size, left : left + size].permute(0, 2, 3, 1).contiguous().numpy()
