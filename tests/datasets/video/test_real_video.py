"""The real clips beside the repository: decoded at their own rates and lengths."""

import json

import numpy as np
import pytest
from lightning import Trainer, seed_everything
from locations import SHARED_DATA

import mmskip
from mmskip.datasets.narration.module import NarrationData
from mmskip.datasets.video.reader import read_video, video_info
from mmskip.models.video_llm.module import VideoLLM

FOLDER = SHARED_DATA / "video"
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


@pytest.fixture(scope="module")
def narrated(tmp_path_factory):
    """The clips with a hand-made narration file; one narration is the publisher's own."""
    folder = tmp_path_factory.mktemp("narrated")
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
    (folder / "narrations.json").write_text(json.dumps({"videos": videos}))
    data = NarrationData(
        root=str(folder / "data"),
        annotations={"train": str(folder / "narrations.json")},
        video_dir=str(FOLDER),
        batch_size=7,
        max_frames=30,
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_real_clips_with_a_hand_made_narration_file_become_batches(narrated):
    batch = next(iter(narrated.train_dataloader()))
    turns = {uid: [span.narration for span in spans] for uid, spans in zip(batch["uid"], batch["turns"], strict=True)}
    assert turns["ego4d_clip_cf7c12db"] == ["C lifts container."]
    assert turns["mmaction2_demo"] == ["two men wrestle with the arms", "one man wins"]
    assert len(narrated.dataset("train")) == 7, "the longest clip is cut between its narrations"
    assert batch["features"].isfinite().all() and batch["features"].std() > 0.5


def test_real_clips_are_learned_and_narrated(narrated):
    """A model that has learned these clips by heart says the right thing at the right frame when it streams them."""
    seed_everything(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = VideoLLM(
        llm={"model_type": "llama", "initializer_range": 0.08, **sizes},
        methods=[mmskip.MoDConfig(keep=0.2)],
        lr=3e-3,
        max_new_tokens=12,
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=80, limit_val_batches=0, enable_model_summary=False, **quiet).fit(model, narrated)
    dataset = narrated.dataset("train")
    right = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        said = [(u.frame, narrated.tokens.decode(u.tokens)) for u in model.narrate(sample)]
        first = sample["turns"][0]
        right += (first.frames[1] - 1, first.narration) in said
    assert right >= 5, f"{right} of {len(dataset)} clips narrated as learned"
