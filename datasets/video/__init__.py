"""Video files, their frames, and the features of a frozen vision tower."""

from mmskip.datasets.video.reader import (
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
