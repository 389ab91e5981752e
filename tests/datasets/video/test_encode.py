"""Sharded features: written by several processes, resumed, and read as the others are."""

import json

import numpy as np
import pytest
import torch

from mmskip.datasets.narration.module import NarrationData
from mmskip.datasets.video.encode import encode_folder, main
from mmskip.datasets.video.features import FeatureStore, encode_videos
from mmskip.datasets.video.reader import write_video
from mmskip.datasets.video.tower import VisionTower

KWARGS = {"depth": 1, "embed_dim": 32, "num_heads": 2}
TOWER = {"name": "timm/vit_tiny_patch16_224", "image_size": 32, "grid": 2, "tower_kwargs": KWARGS}
TOWER_ARGS = TOWER | {"pretrained": False, "seed": 0}
OPTIONS = ["--tower", TOWER["name"], "--image-size", "32", "--grid", "2", "--tower-kwargs", json.dumps(KWARGS)]
ONE_VIDEO = 12 * 5 * 32 * 2 / 2**20  # MiB of 12 frames


@pytest.fixture
def videos(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (4, 24, 48, 64, 3), dtype=np.uint8)
    for name, frames in zip("abcd", noise, strict=True):
        write_video(tmp_path / "videos" / f"{name}.mp4", frames, fps=4)
    return {path.stem: path for path in (tmp_path / "videos").iterdir()}


def encode(videos, out, **kwargs):
    return encode_folder(videos, out, TOWER_ARGS, progress=False, device="cpu", **kwargs)


def test_shards_hold_what_single_files_hold(videos, tmp_path):
    folder, report = encode(videos, tmp_path / "out", shard_mib=1.5 * ONE_VIDEO)
    assert (report.encoded, report.reused, report.broken) == (4, 0, {})
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    store, alone = FeatureStore(folder, folder.name), FeatureStore(tmp_path / "alone", folder.name)
    encode_videos(VisionTower(**TOWER_ARGS), list(videos.items()), tmp_path / "alone", 2.0, progress=False)
    assert store.names() == alone.names() == set("abcd")
    for name, path in videos.items():
        assert torch.equal(store.read(name), alone.read(name)) and store.count_frames(name) == 12
        assert torch.equal(store.read(name, slice(3, 5)), alone.read(name)[3:5])
        assert store.is_current(name, path)
    with pytest.raises(ValueError, match="another tower, size or rate"):
        FeatureStore(folder, "another").read("a")


def test_worker_processes_give_the_same_features(videos, tmp_path):
    folder, report = encode(videos, tmp_path / "out", workers=1)
    assert report.encoded == 4
    single, _ = encode(videos, tmp_path / "single")
    for name in videos:
        torch.testing.assert_close(FeatureStore(folder).read(name), FeatureStore(single).read(name), atol=2e-3, rtol=0)


def test_an_interrupted_run_goes_on(videos, tmp_path, monkeypatch):
    from mmskip.datasets.video import encode as module

    real, seen = module.encode_video, []

    def stopping(tower, path, fps):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(path.stem)
        return real(tower, path, fps)

    monkeypatch.setattr(module, "encode_video", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode(videos, tmp_path / "out", shard_mib=1.5 * ONE_VIDEO)
    monkeypatch.setattr(module, "encode_video", real)
    folder, report = encode(videos, tmp_path / "out")
    assert (report.encoded, report.reused) == (1, 3) and FeatureStore(folder).names() == set("abcd")


def test_a_lost_index_a_broken_shard_and_a_changed_video_are_mended(videos, tmp_path):
    folder, _ = encode(videos, tmp_path / "out", shard_mib=1.5 * ONE_VIDEO)
    (folder / "index.json").unlink()
    assert encode(videos, tmp_path / "out")[1].reused == 4
    first = folder / "shard-00000.safetensors"
    first.write_bytes(first.read_bytes()[:-100])
    assert encode(videos, tmp_path / "out")[1].encoded == 2
    write_video(videos["d"], np.zeros((8, 48, 64, 3), np.uint8), fps=4)
    assert encode(videos, tmp_path / "out")[1].encoded == 1
    assert FeatureStore(folder).count_frames("d") == 4 and FeatureStore(folder).count_frames("a") == 12


def test_the_command_counts_broken_videos_and_fails_only_if_asked(videos, tmp_path, capsys):
    videos["b"].write_bytes(videos["b"].read_bytes()[:500])
    command = ["--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "out"), *OPTIONS]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "3 videos encoded, 0 there already, 1 broken" in printed and "b.mp4" in printed
    assert main([*command, "--strict"]) == 1
    assert "0 videos encoded, 3 there already, 1 broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tower", "timm/no_such_model"], "timm has no model"),
        (["--fps", "0"], "fps > 0"),
        (["--shard-size", "0"], "shard size > 0"),
        (["--videos", "nowhere"], "no such folder"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(videos, tmp_path, change, message, capsys):
    assert main(["--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "out"), *OPTIONS, *change]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_data_module_reads_shards_and_needs_no_videos_then(videos, tmp_path):
    records = [{"timestamp_sec": time, "narration_text": f"#C C moves {time}"} for time in (1.0, 3.0)]
    content = {name: {"narration_pass_1": {"narrations": records}} for name in "abcd"}
    (tmp_path / "train.json").write_text(json.dumps(content))
    encode(videos, tmp_path / "out")
    for path in videos.values():
        path.unlink()
    data = NarrationData(
        root=str(tmp_path / "data"),
        annotations={"train": str(tmp_path / "train.json")},
        video_dir=str(tmp_path / "videos"),
        features_dir=str(tmp_path / "out"),
        tower=TOWER["name"],
        image_size=32,
        grid=2,
        tower_kwargs=KWARGS,
    )
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["uid"]) == ["a", "b", "c", "d"] and batch["features"].abs().sum() > 0


def test_features_of_a_changed_video_are_not_hidden_by_a_file_of_before(videos, tmp_path):
    folder, _ = encode({"a": videos["a"]}, tmp_path / "out")
    encode_videos(VisionTower(**TOWER_ARGS), list(videos.items()), folder, 2.0, progress=False)  # as training does
    write_video(videos["b"], np.zeros((8, 48, 64, 3), np.uint8), fps=4)
    assert encode(videos, tmp_path / "out")[1].encoded == 1
    assert FeatureStore(folder).count_frames("b") == 4
    assert encode(videos, tmp_path / "out")[1].reused == 4


def test_features_that_cannot_be_read_leave_out_their_videos_only(videos, tmp_path):
    """Features of a missing video cannot be made again; the other videos are used."""
    records = [{"timestamp_sec": time, "narration_text": f"#C C moves {time}"} for time in (1.0, 3.0)]
    content = {name: {"narration_pass_1": {"narrations": records}} for name in "abcd"}
    (tmp_path / "train.json").write_text(json.dumps(content))
    folder, _ = encode(videos, tmp_path / "out", shard_mib=1.5 * ONE_VIDEO)
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    for path in videos.values():
        path.unlink()
    data = NarrationData(
        root=str(tmp_path / "data"),
        annotations={"train": str(tmp_path / "train.json")},
        video_dir=str(tmp_path / "videos"),
        features_dir=str(tmp_path / "out"),
        tower=TOWER["name"],
        image_size=32,
        grid=2,
        tower_kwargs=KWARGS,
    )
    with pytest.warns(UserWarning, match="left out"):
        data.prepare_data()
    assert [entry.uid for entry in data.dataset("train").entries] == ["a", "b"]
    assert data.counts["train"]["corrupt features"] == 2 and set(data.broken) == {"c", "d"}
