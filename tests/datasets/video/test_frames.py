"""Frames of video files and folders of images, and what is said of odd ones."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from mmskip.datasets.video.frames import open_frames
from mmskip.datasets.video.reader import VideoError, write_video


def pictures(folder, names):
    folder.mkdir()
    for value, name in enumerate(names):
        Image.fromarray(np.full((40, 60, 3), 20 * value, np.uint8)).save(folder / name)
    return folder


def test_images_come_in_the_order_of_their_numbers(tmp_path):
    frames = open_frames(pictures(tmp_path / "f", ["a1.png", "a2.png", "a10.png", "b0.png"]), 2.0, 32)
    (tmp_path / "f" / "notes.txt").write_text("no image")
    got = np.concatenate(list(frames))
    assert got.shape == (4, 32, 32, 3)
    assert got[:, 0, 0, 0].tolist() == [0, 20, 40, 60]
    assert frames.times_s.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert frames.notes == []


def test_a_folder_without_images_and_a_broken_image_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty: holds no image"):
        open_frames(tmp_path / "empty", 2.0, 32)
    folder = pictures(tmp_path / "f", ["1.png", "2.png"])
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    with pytest.raises(VideoError, match=r"2\.png: not a readable image"):
        list(open_frames(folder, 2.0, 32))


def write(path, times, options=None):
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for time_s in times:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), int(time_s * 40), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time_s * 100), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_variable_rate_is_counted_and_frames_follow_their_own_times(tmp_path):
    write(tmp_path / "v.mp4", np.cumsum([0.1, 0.1, 0.1, 0.5] * 6))
    frames = open_frames(tmp_path / "v.mp4", 2.0, 32)
    assert any("variable frame rate: 6 of 24" in note for note in frames.notes)
    assert len(np.concatenate(list(frames))) == len(frames.times_s) == 10


def test_a_video_that_states_no_length_is_played_and_said_so(tmp_path):
    write(tmp_path / "v.mkv", np.arange(30) / 10, {"live": "1"})
    frames = open_frames(tmp_path / "v.mkv", 2.0, 32)
    assert frames.notes == ["the file states no length; its packets say 3.00 s"]
    assert len(np.concatenate(list(frames))) == 6


def test_a_usual_video_needs_no_notes_and_a_truncated_one_is_refused(tmp_path):
    write_video(tmp_path / "v.mp4", np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8), 10)
    assert open_frames(tmp_path / "v.mp4", 2.0, 32).notes == []
    content = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match="cut"):
        open_frames(tmp_path / "cut.mp4", 2.0, 32)


def test_a_raw_stream_without_times_is_told_from_a_broken_file(tmp_path):
    with av.open(str(tmp_path / "v.h264"), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for value in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), "rgb24")))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=r"v\.h264: its \d+ packets carry no times.*ffmpeg -r RATE"):
        open_frames(tmp_path / "v.h264", 2.0, 32)
