"""The real clips beside the repository: decoded at their own rates and lengths."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmskip.datasets.narration import NarrationData
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


def test_real_clips_with_a_hand_made_narration_file_become_batches(tmp_path):
    """At their own rates and lengths, the GIF included; one narration is the publisher's own."""
    texts = {
        "ego4d_clip_cf7c12db": [(0.8, "#C C lifts container.")],
        "ego4d_clip_3c0dffd0_012_014": [(1.2, "#C C works with the hands")],
        "mmaction2_demo": [(2.0, "#O two men wrestle with the arms"), (7.3, "#O one man wins")],
        "mmaction2_test": [(4.0, "#O a man X cleans the pool")],
        "mmaction2_basketball": [(3.0, "#O the players run"), (8.0, "#O a player X throws the ball")],
        "flash_vstream_example": [(5.0, "#O a child X swings"), (20.0, "#O the child X swings again")],
    }
    videos = {
        uid: {
            "narration_pass_1": {"narrations": [{"timestamp_sec": t, "narration_text": text} for t, text in items]},
            "status": "complete",
        }
        for uid, items in texts.items()
    }
    (tmp_path / "narrations.json").write_text(json.dumps({"videos": videos}))
    data = NarrationData(
        root=str(tmp_path / "data"),
        annotations={"train": str(tmp_path / "narrations.json")},
        video_dir=str(FOLDER),
        batch_size=7,
        max_frames=30,
    )
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    turns = {uid: [span.narration for span in spans] for uid, spans in zip(batch["uid"], batch["turns"], strict=True)}
    assert turns["ego4d_clip_cf7c12db"] == ["C lifts container."]
    assert turns["mmaction2_demo"] == ["two men wrestle with the arms", "one man wins"]
    assert len(data.dataset("train")) == 7, "the longest clip is cut between its narrations"
    assert batch["features"].isfinite().all() and batch["features"].std() > 0.5
