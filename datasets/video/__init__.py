"""Video files, their frames, and the features of a frozen vision tower."""

from mmskip.utils.command import quiet_imports

quiet_imports()  # open_clip and transformers follow; here, since workers that encode start with this package

from mmskip.datasets.video.reader import (  # noqa: E402
    Video,
    VideoError,
    VideoInfo,
    VideoStream,
    fit_square,
    read_video,
    sampling_times,
    video_info,
    write_video,
)

__all__ = [
    "Video",
    "VideoError",
    "VideoInfo",
    "VideoStream",
    "fit_square",
    "read_video",
    "sampling_times",
    "video_info",
    "write_video",
]
