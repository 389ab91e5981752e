"""Reading at a fixed rate, by real timestamps, and refusing what is broken."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mmskip.datasets.video import reader as video
from mmskip.datasets.video.reader import VideoError, VideoStream, read_video, video_info, write_video


def grey_frames(levels, height=32, width=48):
    """Flat frames whose grey level is the frame number: [F, H, W, 3]."""
    return np.repeat(np.array(levels, np.uint8)[:, None, None, None], 3, axis=3) * np.ones(
        (1, height, width, 1), np.uint8
    )


def level(frames):
    return frames.mean(axis=(1, 2, 3))


@pytest.fixture
def clip(tmp_path):
    """40 frames at 8 fps, 5 s, getting brighter by 5 each."""
    path = tmp_path / "clip.mp4"
    write_video(path, grey_frames(range(20, 220, 5)), fps=8)
    return path


def write_timed(path, frames, times_ms):
    """A video with these frame times: variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(frames, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_gif(path, frames, fps):
    with av.open(str(path), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb8"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="rgb8")))
        container.mux(stream.encode())


def test_samples_the_frame_shown_at_each_grid_time(clip):
    sampled = read_video(clip, fps=2)
    assert sampled.frames.shape == (10, 32, 48, 3) and sampled.frames.dtype == np.uint8
    assert np.allclose(sampled.times_s, np.arange(10) / 2)
    assert sampled.duration_s == pytest.approx(5) and sampled.source_fps == pytest.approx(8)
    assert np.abs(level(sampled.frames) - np.arange(20, 220, 20)).max() < 3


def test_rates_that_do_not_divide_show_the_last_frame_before_the_time(clip):
    sampled = read_video(clip, fps=3)
    shown = np.floor(np.arange(15) / 3 * 8 + 1e-6)
    assert np.abs(level(sampled.frames) - (20 + 5 * shown)).max() < 3


def test_sampling_faster_than_the_source_repeats_frames(clip):
    sampled = read_video(clip, fps=16, end_s=1)
    assert len(sampled.frames) == 16
    assert np.array_equal(sampled.frames[0], sampled.frames[1])
    assert np.abs(level(sampled.frames[::2]) - np.arange(20, 60, 5)).max() < 3


def test_a_part_of_the_video(clip):
    part = read_video(clip, fps=2, start_s=1, end_s=2.5)
    assert part.times_s.tolist() == [1.0, 1.5, 2.0]
    assert np.abs(level(part.frames) - [60, 80, 100]).max() < 3
    assert read_video(clip, fps=2, start_s=4.9, end_s=99).times_s.tolist() == [4.9]


def test_variable_frame_rate_goes_by_timestamps(tmp_path):
    path = tmp_path / "vfr.mp4"
    write_timed(path, grey_frames([20, 60, 100, 140, 180]), [0, 100, 200, 1500, 1600])
    sampled = read_video(path, fps=2)
    # At 0.5 s and 1.0 s the frame of 0.2 s is still on screen; by frame numbers it would be another.
    assert np.abs(level(sampled.frames) - [20, 100, 100, 140]).max() < 3


def test_decord_and_pyav_give_the_same_frames(clip, monkeypatch):
    pytest.importorskip("decord")
    by_decord = read_video(clip, fps=3, size=16)
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    by_pyav = read_video(clip, fps=3, size=16)
    assert np.array_equal(by_decord.frames, by_pyav.frames)


def test_pyav_seeks_to_a_late_part(clip, monkeypatch):
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    part = read_video(clip, fps=2, start_s=3.5)
    assert np.abs(level(part.frames) - [160, 180, 200]).max() < 3


def test_reads_gif(tmp_path):
    path = tmp_path / "clip.gif"
    write_gif(path, grey_frames([0, 85, 170, 255]), fps=4)
    sampled = read_video(path, fps=2)
    assert np.abs(level(sampled.frames) - [0, 170]).max() < 40


def test_resize_gives_a_square_cut_from_the_centre(tmp_path):
    frames = grey_frames([0] * 4, height=32, width=96)
    frames[:, :, 32:64] = 255
    write_video(tmp_path / "wide.mp4", frames, fps=4)
    sampled = read_video(tmp_path / "wide.mp4", fps=2, size=16)
    assert sampled.frames.shape[1:] == (16, 16, 3)
    assert sampled.frames[:, :, 2:-2].min() > 240


def test_long_videos_come_in_chunks(tmp_path):
    write_video(tmp_path / "long.mp4", grey_frames(np.arange(100) + 50), fps=10)
    stream = VideoStream(tmp_path / "long.mp4", fps=10)
    sizes = [len(chunk) for chunk in stream]
    assert sum(sizes) == len(stream.times_s) == 100 and max(sizes) <= 32


def test_info_needs_no_decoding(clip, monkeypatch):
    monkeypatch.setattr(video, "_decode", None)
    info = video_info(clip)
    assert (info.num_frames, info.height, info.width) == (40, 32, 48)
    assert info.duration_s == pytest.approx(5) and info.source_fps == pytest.approx(8)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_rates_are_refused(clip, fps):
    with pytest.raises(VideoError, match="fps"):
        read_video(clip, fps)


def test_nothing_to_read_is_refused(clip, tmp_path):
    with pytest.raises(VideoError, match="no such file"):
        read_video(tmp_path / "none.mp4", 2)
    (tmp_path / "zero.mp4").touch()
    with pytest.raises(VideoError, match="0 bytes"):
        read_video(tmp_path / "zero.mp4", 2)
    (tmp_path / "text.mp4").write_text("not a video at all " * 50)
    with pytest.raises(VideoError, match="not a readable video"):
        read_video(tmp_path / "text.mp4", 2)
    with pytest.raises(VideoError, match=r"no frame between 9 s .* 5\.000 s long"):
        read_video(clip, 2, start_s=9)


def test_sound_without_pictures_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        read_video(path, 2)


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    target = path.with_name(f"cut{path.suffix}")
    target.write_bytes(data[: int(len(data) * share)])
    return target


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_cut_mp4_is_refused(tmp_path, share):
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "noise.mp4", noise, fps=8)
    with pytest.raises(VideoError, match="cut off"):
        read_video(cut(tmp_path / "noise.mp4", share), 2)


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_cut_file_that_partly_decodes_is_not_silently_short(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), dtype=np.uint8)
    full, fast = tmp_path / "noise.mp4", tmp_path / f"fast{suffix}"
    write_video(full, noise, fps=8)
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    with av.open(str(full)) as source, av.open(str(fast), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert len(read_video(fast, 8).frames) == 60
    with pytest.raises(VideoError, match=r"truncated: \d+ (of 60 )?frames"):
        read_video(cut(fast, share), 8)


def test_a_cut_gif_is_refused(tmp_path):
    path = tmp_path / "clip.gif"
    write_gif(path, np.random.default_rng(0).integers(0, 255, (8, 32, 48, 3), dtype=np.uint8), fps=4)
    with pytest.raises(VideoError, match="truncated"):
        read_video(cut(path, 0.6), 2)


def test_frames_that_fail_to_decode_are_counted(clip, monkeypatch):
    monkeypatch.setattr(video, "_decode", lambda path, scan, wanted: iter([np.zeros((3, 32, 48, 3), np.uint8)]))
    with pytest.raises(VideoError, match="only 3 of 10 frames could be decoded"):
        read_video(clip, 2)


def test_writing_refuses_what_the_codec_would_change(tmp_path):
    path = tmp_path / "out.mp4"
    with pytest.raises(VideoError, match="even height and width"):
        write_video(path, grey_frames([1], height=33), 4)
    with pytest.raises(VideoError, match="no frames"):
        write_video(path, [], 4)
    with pytest.raises(VideoError, match="uint8"):
        write_video(path, np.zeros((2, 32, 32, 3), np.float32), 4)
    with pytest.raises(VideoError, match="fps"):
        write_video(path, grey_frames([1]), 0)
    with pytest.raises(VideoError, match="differ in shape"):
        write_video(path, [np.zeros((32, 32, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)], 4)
    assert list(tmp_path.iterdir()) == [], "a refused video must leave no files"


@pytest.mark.parametrize(("degrees", "corner"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (270, (0, 1))])
@pytest.mark.parametrize("with_decord", [True, False])
def test_a_phone_video_is_turned_as_its_metadata_say(tmp_path, degrees, corner, with_decord, monkeypatch):
    """The stored frame is white in its top left corner; degrees are counter-clockwise."""
    if not with_decord:
        monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "phone.mp4"
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    info, sampled = video_info(path), read_video(path, fps=2)
    shape = (48, 64) if degrees % 180 == 0 else (64, 48)
    assert (info.height, info.width) == sampled.frames.shape[1:3] == shape
    quarters = sampled.frames[:, [4, -5]][:, :, [4, -5]].mean(-1)
    assert (quarters.argmax(-1).max(), quarters.max(-1).argmax(-1).max()) == (corner[1], corner[0])
    assert read_video(path, fps=2, size=24).frames.shape == (4, 24, 24, 3)
