"""The Ego4D narration format as published, with everything that goes wrong in practice."""

import json

import numpy as np
import pytest

from mmskip.datasets.narration.formats.ego4d import clean_text
from mmskip.datasets.narration.index import load_narrations
from mmskip.datasets.video.reader import write_video


def record(time, text):
    return {
        "timestamp_sec": time,
        "timestamp_frame": int((time or 0) * 30),
        "_unmapped_timestamp_sec": time,
        "narration_text": text,
        "annotation_uid": "0-0",
    }


def entry(*records, second=(), status="complete"):
    passes = {"narration_pass_1": {"narrations": list(records), "summaries": []}}
    if second:
        passes["narration_pass_2"] = {"narrations": list(second), "summaries": []}
    return {**passes, "status": status}


@pytest.fixture
def folder(tmp_path):
    frames = np.zeros((16, 32, 32, 3), np.uint8)
    for uid in ("a", "b", "alone"):
        write_video(tmp_path / "videos" / f"{uid}.mp4", frames, fps=4)  # 4 s
    return tmp_path


def save(folder, videos, nested=True):
    path = folder / "narrations.json"
    path.write_text(json.dumps({"version": "1.0", "videos": videos} if nested else videos))
    return path


@pytest.mark.parametrize(
    ("tagged", "plain"),
    [
        ("#C C opens a door", "C opens a door"),
        ("#c c opens a door.", "c opens a door."),
        ("#O man X walks #unsure", "man X walks"),
        ("# C C  picks #Unsure  from the table ", "C picks from the table"),
        ("#unsure", ""),
        ("the red circle hides", "the red circle hides"),
    ],
)
def test_tags_are_cleaned(tagged, plain):
    assert clean_text(tagged) == plain


@pytest.mark.parametrize("nested", [True, False])
def test_both_published_forms_are_read(folder, nested):
    path = save(folder, {"a": entry(record(1.0, "#C C opens a door"), record(2.5, "#C C closes it"))}, nested)
    videos, _ = load_narrations(path, folder / "videos")
    assert [(video.uid, video.path.name) for video in videos] == [("a", "a.mp4")]
    assert [(item.time_s, item.text) for item in videos[0].narrations] == [
        (1.0, "C opens a door"),
        (2.5, "C closes it"),
    ]


def test_everything_left_out_is_counted(folder):
    (folder / "videos" / "broken.mp4").write_bytes(b"no video" * 99)
    (folder / "videos" / "zero.mp4").touch()
    (folder / "videos" / "notes.txt").touch()
    good = record(1.0, "#C C does x")
    path = save(
        folder,
        {
            "a": entry(
                record(2.0, "#C C second"), good, record(9.0, "#C C late"), record(1.5, "#unsure"), record(None, "x y")
            ),
            "b": entry(record(50.0, "#C C all of it late")),
            "gone": entry(good),
            "broken": entry(good),
            "zero": entry(good),
            "secret": {"status": "redacted"},
            "bare": entry(),
        },
    )
    videos, report = load_narrations(path, folder / "videos")
    assert [video.uid for video in videos] == ["a"]
    assert [item.text for item in videos[0].narrations] == ["C does x", "C second"], "sorted by time"
    assert report.counts == {
        "video without narration": 1,
        "redacted": 1,
        "no narrations": 2,
        "video missing": 1,
        "corrupt video": 2,
        "past the end": 2,
        "empty text": 1,
        "no time": 1,
        "out of order": 1,
    }
    text = str(report)
    assert "video missing: 1 (gone)" in text and "zero.mp4: the file is empty" in text


def test_second_annotator_makes_entries_of_its_own(folder):
    path = save(folder, {"a": entry(record(1, "#C C does x"), second=[record(2, "#C C does y")])})
    assert len(load_narrations(path, folder / "videos")[0]) == 1
    videos, _ = load_narrations(path, folder / "videos", passes=("narration_pass_1", "narration_pass_2"))
    assert [(video.annotator, video.narrations[0].text) for video in videos] == [
        ("narration_pass_1", "C does x"),
        ("narration_pass_2", "C does y"),
    ]


def test_without_looking_into_videos_broken_ones_stay(folder):
    (folder / "videos" / "zero.mp4").touch()
    path = save(folder, {"zero": entry(record(99, "#C C does x"))})
    videos, report = load_narrations(path, folder / "videos", check_videos=False)
    assert len(videos) == 1 and not report.counts["past the end"]


def test_unusable_files_are_refused(folder):
    with pytest.raises(ValueError, match="no such narration file"):
        load_narrations(folder / "none.json", folder / "videos")
    (folder / "bad.json").write_text('{"videos": {')
    with pytest.raises(ValueError, match="not a readable JSON"):
        load_narrations(folder / "bad.json", folder / "videos")
    for content in ([1, 2], {"videos": []}, {"info": {"a": 1}}, {"videos": {"a": {"clips": []}}}):
        (folder / "other.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="not Ego4D's narration schema"):
            load_narrations(folder / "other.json", folder / "videos")
    path = save(folder, {"gone": entry(record(1, "#C C does x"))})
    with pytest.raises(ValueError, match=r"no narrated video is usable .*video missing: 1 \(gone\)"):
        load_narrations(path, folder / "videos")
    with pytest.raises(ValueError, match="no such folder of videos"):
        load_narrations(path, folder / "elsewhere")
