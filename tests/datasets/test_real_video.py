"""The real clips beside the repository: decoded at their own rates and lengths."""

from pathlib import Path

import numpy as np
import pytest

from mmskip.datasets.video import read_video, video_info

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "video"
CLIPS = {  # frames, width, height, fps, as the publishers state them
    "ego4d_clip_3c0dffd0_012_014.mp4": (60, 384, 288, 30),
    "ego4d_clip_cf7c12db.gif": (50, 384, 288, 25),
    "mmaction2_demo.mp4": (280, 340, 256, 28),
    "mmaction2_test.mp4": (300, 340, 256, 30),
    "mmaction2_basketball.mp4": (300, 426, 240, 29.97),
    "flash_vstream_example.mp4": (929, 480, 360, 23.98),
}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real clips (../shared/data/video) are not here")


@pytest.mark.parametrize("name", CLIPS)
def test_real_clip(name):
    frames, width, height, fps = CLIPS[name]
    info = video_info(FOLDER / name)
    assert (info.num_frames, info.width, info.height) == (frames, width, height)
    assert info.source_fps == pytest.approx(fps, rel=1e-3)
    assert info.duration_s == pytest.approx(frames / fps, rel=1e-3)
    sampled = read_video(FOLDER / name, fps=2, size=96)
    assert sampled.frames.shape == (int(np.ceil(info.duration_s * 2)), 96, 96, 3)
    assert sampled.frames.std() > 20, "a real picture has contrast"
    assert np.abs(np.diff(sampled.frames.astype(int), axis=0)).mean() > 1, "and it moves"


def test_cut_real_clip(tmp_path):
    """A web-optimised file keeps its header when the download breaks off: a reader that trusts it repeats frames."""
    data = (FOLDER / "flash_vstream_example.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"truncated: \d+ of 929 frames"):
        read_video(tmp_path / "cut.mp4", fps=2)
