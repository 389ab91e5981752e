"""The embedded set on disk: real files, published format, deterministic, resumable."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.narration.index import load_narrations
from mmskip.datasets.narration.turns import frame_index
from mmskip.datasets.synthetic.videos import GeneratedConfig, generate, video_uid, world_of
from mmskip.datasets.synthetic.world import SceneConfig
from mmskip.datasets.video.reader import read_video, video_info

CONFIG = GeneratedConfig(train=3, val=1, test=1, image_size=48, scene=SceneConfig(ticks=10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("set") / "embedded", CONFIG, workers=0, progress=False)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_videos_are_real_files_at_the_stated_rate(folder):
    for split, count in zip(SPLITS, (3, 1, 1), strict=True):
        files = sorted((folder / split / "videos").iterdir())
        assert [path.name for path in files] == [f"{video_uid(split, index)}.mp4" for index in range(count)]
    info = video_info(files[0])
    assert (info.height, info.width, info.num_frames) == (48, 48, 20)
    assert info.source_fps == pytest.approx(4) and info.duration_s == pytest.approx(5)


def test_narrations_load_as_ego4d_and_round_up_to_the_frames_that_show_them(folder):
    videos, report = load_narrations(folder / "train" / "narrations.json", folder / "train" / "videos")
    assert len(videos) == 3 and not report.counts
    for index, video in enumerate(videos):
        narrations = world_of(CONFIG, "train", index).narrations
        assert [item.text for item in video.narrations] == [item.text for item in narrations]
        assert [frame_index(item.time_s, CONFIG.fps) for item in video.narrations] == [item.tick for item in narrations]


def test_words_without_files_are_the_same(folder):
    content = json.loads((folder / "val" / "narrations.json").read_text())
    records = content["videos"]["val-00000"]["narration_pass_1"]["narrations"]
    assert [record["narration_text"] for record in records] == list(CONFIG.texts("val"))


def test_same_settings_same_bytes_other_seed_other_stories(folder, tmp_path):
    again = generate(tmp_path / "again", CONFIG, workers=2, progress=False)
    assert contents(again) == contents(folder), "also with worker processes"
    other = replace(CONFIG, seed=1)
    assert other.id != CONFIG.id and list(other.texts("train")) != list(CONFIG.texts("train"))


def test_splits_share_no_video():
    stories = [tuple(event.text for event in world_of(CONFIG, split, 0).narrations) for split in SPLITS]
    assert len(set(stories)) == 3


def test_an_interrupted_run_is_taken_up(folder, tmp_path):
    root = tmp_path / "set"
    generate(root, CONFIG, workers=0, progress=False)
    lost = root / "train" / "videos" / "train-00001.mp4"
    kept = root / "train" / "videos" / "train-00000.mp4"
    lost.unlink()
    (root / "train" / "narrations.json").unlink()
    before = kept.stat().st_mtime_ns
    generate(root, CONFIG, workers=0, progress=False)
    assert contents(root) == contents(folder) and kept.stat().st_mtime_ns == before


def test_a_finished_set_is_left_alone(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    generate(folder, CONFIG)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_settings_in_the_folder_are_refused(folder):
    before = contents(folder)
    with pytest.raises(ValueError, match=r"other settings \(scene, seed differ\)"):
        generate(folder, replace(CONFIG, seed=5, scene=SceneConfig(ticks=11)))
    assert contents(folder) == before


def test_frames_differ_between_videos(folder):
    videos = [read_video(folder / "train" / "videos" / f"train-0000{index}.mp4", 2).frames for index in range(2)]
    assert np.abs(videos[0].astype(int) - videos[1]).mean() > 5


@pytest.mark.parametrize(
    "settings", [{"train": 0}, {"seed": -1}, {"image_size": 95}, {"fps": 0}, {"crf": 60}, {"frames_per_tick": 0}]
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"GeneratedConfig.{next(iter(settings))}"):
        GeneratedConfig(**settings)
