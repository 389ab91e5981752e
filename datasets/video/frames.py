"""Frames of anything that can be watched: a video file, or a folder of images.

Shapes: F frames, H height, W width; RGB uint8.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmskip.datasets.video.reader import VideoError, VideoStream, fit_square

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class ImageFolder:
    """The images of a folder in the order of their names (numbers by value), one per 1 / fps seconds.

    Attributes:
        times_s: float64 [F].
        duration_s: length, seconds.
        notes: remarks on the source for the user.

    Raises:
        VideoError: no image in it.
    """

    def __init__(self, path: str | Path, fps: float, size: int) -> None:
        self.path, self.size = Path(path), size
        self.files = sorted((f for f in self.path.iterdir() if f.suffix.lower() in IMAGES), key=_natural)
        if not self.files:
            raise VideoError(f"{path}: holds no image ({', '.join(IMAGES)})")
        if not (fps > 0 and math.isfinite(fps)):
            raise VideoError(f"fps must be a positive number of frames per second, got {fps}")
        self.times_s = np.arange(len(self.files)) / fps
        self.duration_s = len(self.files) / fps
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        """uint8 [1, size, size, 3] each.

        Raises:
            VideoError: an image that cannot be read.
        """
        for file in self.files:
            try:
                with Image.open(file) as image:
                    frame = np.array(image.convert("RGB"))
            except (UnidentifiedImageError, OSError) as error:
                raise VideoError(f"{file}: not a readable image ({error}); remove it or copy it again") from error
            yield fit_square(frame[None], self.size)


class VideoFrames:
    """A video file as `ImageFolder` is a folder: a `VideoStream` with its notes."""

    def __init__(self, path: str | Path, fps: float, size: int) -> None:
        self._stream = VideoStream(path, fps, size)
        self.times_s = self._stream.times_s
        info = self._stream.info
        self.duration_s = info.duration_s
        self.notes = []
        if info.uneven:
            self.notes.append(
                f"variable frame rate: {info.uneven} of {info.num_frames} frames are shown shorter or longer than the "
                "others; frames are taken by their own times"
            )
        if not info.stated_s:
            self.notes.append(f"the file states no length; its packets say {info.duration_s:.2f} s")

    def __iter__(self) -> Iterator[np.ndarray]:
        """uint8 [<= 32, size, size, 3] each."""
        return iter(self._stream)


def open_frames(path: str | Path, fps: float, size: int) -> ImageFolder | VideoFrames:
    """Frames of a video file or of a folder of images, at `fps` frames per second, short side `size`, centre cut.

    Raises:
        VideoError: nothing there that can be watched.
    """
    return (ImageFolder if Path(path).is_dir() else VideoFrames)(path, fps, size)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key by which 10 follows 9."""
    digits = "".join(c if c.isdigit() else " " for c in path.stem).split()
    letters = "".join(" " if c.isdigit() else c for c in path.stem)
    return [(0, letters), *((int(number), "") for number in digits), (0, path.suffix)]
