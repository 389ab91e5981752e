"""Frame features on disk: encoded once, never mixed, broken files left out."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmskip.datasets.video.features import (
    FeatureStore,
    encode_videos,
    features_key,
    features_path,
    read_statistics,
    write_statistics,
)
from mmskip.datasets.video.reader import read_video, write_video
from mmskip.datasets.video.tower import VisionTower

TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def tower():
    return VisionTower("timm/vit_tiny_patch16_224", image_size=32, grid=2, tower_kwargs=TINY)


@pytest.fixture
def videos(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (3, 24, 48, 64, 3), dtype=np.uint8)
    paths = [tmp_path / f"{uid}.mp4" for uid in "abc"]
    for path, frames in zip(paths, noise, strict=True):
        write_video(path, frames, fps=4)
    return [(path.stem, path) for path in paths]


def encode(tower, videos, folder, fps=2.0):
    return encode_videos(tower, videos, folder, fps, progress=False)


def test_features_are_the_towers_own(tower, videos, tmp_path):
    report = encode(tower, videos, tmp_path / "cache")
    assert (report.encoded, report.reused, report.broken) == (3, 0, {})
    uid, path = videos[0]
    frames = torch.from_numpy(read_video(path, 2, 32).frames).permute(0, 3, 1, 2)
    store = FeatureStore(tmp_path / "cache")
    assert torch.allclose(store.read(uid), tower(frames), atol=2e-3)
    assert store.read(uid).shape == (12, 5, 32) and store.count_frames(uid) == 12
    assert torch.equal(store.read(uid, slice(3, 7)), store.read(uid)[3:7])
    assert store.names() == {"a", "b", "c"}
    assert load_file(features_path(tmp_path / "cache", uid))["features"].dtype == torch.float16


def test_a_second_run_does_nothing_and_an_interrupted_one_goes_on(tower, videos, tmp_path):
    folder = tmp_path / "cache"
    encode(tower, videos[:2], folder)
    (folder / ".c.safetensors.1.part").write_bytes(b"left by a killed run")
    report = encode(tower, videos, folder)
    assert (report.encoded, report.reused) == (1, 2)
    assert encode(tower, videos, folder).reused == 3


def test_an_unreadable_cache_file_is_made_again(tower, videos, tmp_path):
    folder = tmp_path / "cache"
    encode(tower, videos, folder)
    features_path(folder, "b").write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a readable feature file"):
        FeatureStore(folder).read("b")
    report = encode(tower, videos, folder)
    assert (report.encoded, report.reused) == (1, 2)
    FeatureStore(folder).read("b")


def test_a_changed_video_is_encoded_again_and_a_deleted_one_is_not_needed(tower, videos, tmp_path):
    folder = tmp_path / "cache"
    encode(tower, videos, folder)
    write_video(videos[0][1], np.zeros((8, 48, 64, 3), np.uint8), fps=4)
    videos[1][1].unlink()
    report = encode(tower, videos, folder)
    assert (report.encoded, report.reused) == (1, 2)
    assert FeatureStore(folder).count_frames("a") == 4


def test_a_changed_video_of_the_same_size_is_noticed(tower, videos, tmp_path):
    folder = tmp_path / "cache"
    encode(tower, videos[:1], folder)
    path = videos[0][1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert encode(tower, videos[:1], folder).reused == 0


def test_broken_videos_are_left_out_and_the_run_goes_on(tower, videos, tmp_path):
    videos[1][1].write_bytes(videos[1][1].read_bytes()[:500])
    report = encode(tower, videos, tmp_path / "cache")
    assert report.encoded == 2 and set(report.broken) == {"b"} and "b.mp4" in report.broken["b"]
    assert not features_path(tmp_path / "cache", "b").exists()


def test_features_of_another_tower_or_rate_are_never_taken(tower, videos, tmp_path):
    folder = tmp_path / "cache"
    encode(tower, videos[:1], folder)
    key = features_key(tower.features_id, 2.0)
    assert FeatureStore(folder, key).read("a").shape[0] == 12
    with pytest.raises(ValueError, match="another tower, size or rate"):
        FeatureStore(folder, features_key(tower.features_id, 4.0)).read("a")
    other = VisionTower("timm/vit_tiny_patch16_224", image_size=32, grid=2, tower_kwargs=TINY, seed=1)
    assert features_key(other.features_id, 2.0) != key
    assert encode(other, videos[:1], folder).encoded == 1, "in the same folder it is replaced, not reused"


def test_statistics_are_those_of_all_rows(tower, videos, tmp_path):
    folder = tmp_path / "cache"
    encode(tower, videos, folder)
    store = FeatureStore(folder)
    write_statistics(folder / "statistics", store, [uid for uid, _ in videos])
    mean, std = read_statistics(folder / "statistics")
    rows = torch.cat([store.read(uid) for uid, _ in videos]).flatten(0, 1)
    assert torch.allclose(mean, rows.mean(0), atol=1e-4) and torch.allclose(std, rows.std(0), rtol=0.02)
    with pytest.raises(ValueError, match="run prepare_data first"):
        read_statistics(folder / "none")
    with pytest.raises(ValueError, match="at least one feature file"):
        write_statistics(folder / "none", store, [])
