"""Long-term anticipation, Goal-Step, EgoExo4D and EPIC-KITCHENS annotations, in their published forms."""

import json

import pytest
from locations import SHARED_DATA as SHARED

from mmskip.datasets.narration.index import detect_format, load_narrations, read_annotations

COLUMNS = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)


def lta(*actions):
    """Actions (clip, start, end, verb, noun); clip `c<n>` starts at 100 * n seconds of video "film"."""
    clips = [
        {
            "video_uid": "film",
            "clip_uid": clip,
            "clip_parent_start_sec": 100.0 * int(clip[1:]),
            "action_clip_start_sec": start,
            "action_clip_end_sec": end,
            "verb": verb,
            "noun": noun,
            "action_idx": index,
        }
        for index, (clip, start, end, verb, noun) in enumerate(actions)
    ]
    return {"version": "v1", "split": "val", "clips": clips}


def step(start, end, text, *substeps):
    return {"start_time": start, "end_time": end, "step_description": text, "segments": list(substeps)}


GOALSTEP = {
    "version": "1.0",
    "split": "val",
    "videos": [
        {
            "video_uid": "a",
            "segments": [step(5.0, 9.0, "mixes dough", step(5.0, 6.0, "adds flour")), step(1.0, 4.0, "washes hands")],
        },
        {
            "video_uid": "b",
            "segments": [step(2.0, 8.0, "one"), step(7.0, 9.0, "two words"), step(9.0, 3.0, "back")],
        },
    ],
}
EXO = {
    "annotations": {
        "take-1": [
            {"rejected": True, "descriptions": [{"text": "wrong", "timestamp": 1.0}]},
            {
                "rejected": False,
                "descriptions": [
                    {"text": "C picks a cup", "timestamp": 2.5, "subject": "C", "unsure": False, "ego_visible": True},
                    {"text": "C does a thing", "timestamp": 3.0, "unsure": True},
                ],
            },
            {"rejected": False, "descriptions": [{"text": "C lifts a cup", "timestamp": 2.0, "unsure": False}]},
        ],
        "take-2": [{"rejected": True, "descriptions": []}],
    }
}


def epic(*rows):
    lines = [
        f"{video}_{index},P01,{video},{spoken},{start},{stop},1,2,{text},take,0,plate,2,['plate'],[2]"
        for index, (video, spoken, start, stop, text) in enumerate(rows)
    ]
    return "\n".join([COLUMNS, *lines]) + "\n"


EPIC = epic(
    ("P01_11", "00:00:00.560", "00:00:00.00", "00:00:01.89", "take plate"),
    ("P01_11", "00:01:02.500", "00:01:02.00", "01:01:03.00", "put down plate"),
    ("P01_12", "", "00:00:01.00", "00:00:02.00", "open door"),
    ("P01_12", "", "never", "00:00:02.00", "open it"),
)


def save(folder, content, name="annotations.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def videos(folder, *names):
    for name in names:
        path = folder / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder / "videos"


def read_folder(path, folder, **kwargs):
    loaded, report = load_narrations(path, folder, check_videos=False, **kwargs)
    return {(v.uid, v.annotator): [(n.time_s, n.text) for n in v.narrations] for v in loaded}, report.counts


def test_the_format_is_known_by_its_keys(tmp_path):
    assert detect_format(save(tmp_path, lta(("c1", 1, 2, "cut", "bread")))) == "ego4d_lta"
    assert detect_format(save(tmp_path, GOALSTEP)) == "goalstep"
    assert detect_format(save(tmp_path, EXO)) == "egoexo4d"
    assert detect_format(save(tmp_path, EPIC, "a.csv")) == "epic_kitchens"
    assert detect_format(save(tmp_path, {"u": {"status": "complete"}})) == "ego4d"
    with pytest.raises(ValueError, match="CoinData"):
        detect_format(save(tmp_path, {"database": {}}))


def test_long_term_anticipation_on_clips_or_on_the_whole_video(tmp_path):
    path = save(
        tmp_path,
        lta(
            ("c1", 1.0, 2.0, "turn_on_(switch_on,_start)", "cabinet_(cupboard)"),
            ("c2", 3.0, 4.5, "cut", "bread"),
            ("c2", 5.0, 6.0, None, None),  # as in the unannotated test file
        ),
    )
    clips, counts = read_folder(path, videos(tmp_path / "clips", "c1.mp4", "c2.mp4"))
    assert clips == {("c1", "actions"): [(2.0, "turn on cabinet")], ("c2", "actions"): [(4.5, "cut bread")]}
    assert counts == {"empty text": 1}
    full, _ = read_folder(path, videos(tmp_path / "whole", "film.mp4"), narrate_at="start")
    assert full == {("film", "actions"): [(101.0, "turn on cabinet"), (203.0, "cut bread")]}


def test_goal_step_steps_and_substeps(tmp_path):
    path = save(tmp_path, GOALSTEP)
    folder = videos(tmp_path, "deep/er/a.mp4", "b.MP4", "unknown.mkv")
    steps, counts = read_folder(path, folder)
    assert steps == {
        ("a", "steps"): [(4.0, "washes hands"), (9.0, "mixes dough")],
        ("b", "steps"): [(8.0, "one"), (9.0, "two words")],
    }
    assert counts == {
        "out of order": 1,
        "overlapping": 1,
        "ends before its start": 1,
        "video without narration": 1,
    }
    both, _ = read_folder(path, folder, passes=["steps", "substeps"], narrate_at="start")
    assert both["a", "substeps"] == [(5.0, "adds flour")] and both["b", "steps"][0] == (2.0, "one")


def test_steps_without_times_cannot_be_streamed(tmp_path):
    content = {"videos": [{"video_uid": "a", "step_segments": [{"step_description": "slice", "segment_count": 2}]}]}
    path = save(tmp_path, content)
    with pytest.raises(ValueError, match=r"no narrated video is usable .*no time: 1 \(a\)"):
        read_folder(path, videos(tmp_path, "a.mp4"))


def test_egoexo4d_annotators_and_take_names(tmp_path):
    path = save(tmp_path, EXO)
    first, counts = read_folder(path, videos(tmp_path, "take-1.mp4"))
    assert first == {("take-1", "annotator_1"): [(2.5, "C picks a cup")]}
    assert counts == {"rejected": 2, "unsure": 1, "rejected by its annotators": 1}
    both, _ = read_folder(path, tmp_path / "videos", passes=["annotator_1", "annotator_2"])
    assert both["take-1", "annotator_2"] == [(2.0, "C lifts a cup")]
    save(tmp_path, [{"take_uid": "take-1", "take_name": "cmu_bike_1"}], "takes.json")
    loaded, _ = load_narrations(path, videos(tmp_path / "named", "cmu_bike_1.mp4"), check_videos=False)
    assert (loaded[0].uid, loaded[0].path.name) == ("take-1", "cmu_bike_1.mp4")


def test_epic_kitchens_says_when_its_narrator_spoke(tmp_path):
    path = save(tmp_path, EPIC, "epic.csv")
    folder = videos(tmp_path, "P01/videos/P01_11.MP4", "P01/videos/P01_12.MP4")
    spoken, counts = read_folder(path, folder)
    assert spoken["P01_11", "narrations"] == [(0.56, "take plate"), (62.5, "put down plate")]
    assert spoken["P01_12", "narrations"] == [(2.0, "open door")]  # nobody knows when: at its end
    assert counts == {"no time": 1}
    ends, _ = read_folder(path, folder, narrate_at="end")
    assert ends["P01_11", "narrations"] == [(1.89, "take plate"), (3663.0, "put down plate")]
    with pytest.raises(ValueError, match="missing: narration_timestamp"):
        read_folder(save(tmp_path, "video_id,start_timestamp,stop_timestamp,narration\n", "bad.csv"), folder)


def test_redacted_intervals_are_left_out(tmp_path):
    def said(*times):
        records = [{"timestamp_sec": time, "narration_text": f"#C C at {time}"} for time in times]
        return {"narration_pass_1": {"narrations": records}, "status": "complete"}

    path = save(tmp_path, {"videos": {"a": said(1, 5, 9), "b": said(6)}})
    metadata = {
        "videos": [{"video_uid": uid, "redacted_intervals": [{"start_sec": 4.0, "end_sec": 6.0}]} for uid in ("a", "b")]
    }
    kept, counts = read_folder(
        path, videos(tmp_path, "a.mp4", "b.mp4"), redactions=save(tmp_path, metadata, "ego4d.json")
    )
    assert [time for time, _ in kept["a", "narration_pass_1"]] == [1, 9]
    assert counts == {"in a redacted interval": 2, "redacted": 1}
    with pytest.raises(ValueError, match="not Ego4D's metadata schema"):
        read_folder(path, tmp_path / "videos", redactions=path)


def test_redacted_intervals_of_a_video_are_those_of_its_clips(tmp_path):
    path = save(tmp_path, lta(("c1", 1.0, 2.0, "cut", "bread"), ("c1", 5.0, 6.0, "eat", "bread")))
    metadata = {"videos": [{"video_uid": "film", "redacted_intervals": [{"start_sec": 104.0, "end_sec": 105.5}]}]}
    redactions = save(tmp_path, metadata, "ego4d.json")
    for name in ("c1", "film"):
        found, counts = read_folder(path, videos(tmp_path / name, f"{name}.mp4"), redactions=redactions)
        (texts,) = found.values()
        assert [text for _, text in texts] == ["cut bread"]
        assert counts["in a redacted interval"] == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            {"u": {"narration_pass_1": {"narrations": [7, {"timestamp_sec": 1.0, "narration_text": "C sits"}]}}},
            "C sits",
        ),
        (lta(("c1", 1.0, 2.0, "cut", "bread")) | {"clips": [*lta(("c1", 1.0, 2.0, "cut", "bread"))["clips"], 7]}, None),
        ({"videos": [{"video_uid": "a", "segments": [7, step(1.0, 2.0, "mixes dough")]}]}, "mixes dough"),
        ({"videos": [{"video_uid": "a", "segments": [{**step(1.0, 2.0, "mixes dough"), "segments": 7}]}]}, None),
        ({"annotations": {"t": [7, {"descriptions": [{"text": "C sits", "timestamp": 1.0}]}]}}, "C sits"),
        ({"annotations": {"t": [{"descriptions": [7, {"text": "C sits", "timestamp": 1.0}]}]}}, "C sits"),
        ({"annotations": {"t": [{"descriptions": [{"text": 7, "timestamp": 1.0}]}]}}, ""),
    ],
)
def test_one_malformed_record_does_not_end_the_reading(tmp_path, content, text):
    kwargs = {"passes": ["steps", "substeps"]} if "videos" in content else {}
    entries, report = read_annotations(save(tmp_path, content), **kwargs)
    assert report.counts["malformed"] == 1
    texts = [moment.text for entry in entries for moment in entry.moments]
    assert texts == ([] if text == "" else [text] if text else texts) and (text == "" or texts)


def test_a_video_that_is_encoded_already_may_be_gone(tmp_path):
    path = save(tmp_path, GOALSTEP)
    found, counts = read_folder(path, videos(tmp_path, "b.mp4"), encoded={"a"})
    assert {uid for uid, _ in found} == {"a", "b"} and not counts["video missing"]


def test_names_that_do_not_exist_are_refused(tmp_path):
    path = save(tmp_path, GOALSTEP)
    folder = videos(tmp_path, "a.mp4")
    for kwargs, message in [
        ({"format": "ego5d"}, "format is 'ego5d'; expected auto or one of ego4d"),
        ({"passes": ["stages"]}, r"narration_passes has 'stages'; .* knows steps\|substeps"),
        ({"narrate_at": "middle"}, "narrate_at is 'middle'; expected one of end, start, spoken"),
        ({"format": "egoexo4d"}, "not EgoExo4D's schema"),
        ({"format": "ego4d_lta"}, "not Ego4D's fho_lta schema"),
        ({"format": "epic_kitchens"}, "not EPIC-KITCHENS' columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_folder(path, folder, **kwargs)


@pytest.mark.skipif(not (SHARED / "ego4d").is_dir(), reason="needs ../shared/data/ego4d and epic_kitchens")
@pytest.mark.parametrize(
    ("file", "passes", "counts"),
    [
        ("ego4d/goalstep_valid_twothirds.json", ["steps"], (90, 2232)),
        ("ego4d/goalstep_valid_twothirds.json", ["substeps"], (90, 2900)),
        ("ego4d/goalstep_test.json", None, (134, 0)),
        ("epic_kitchens/EPIC_100_validation_twothirds.csv", None, (92, 6800)),
    ],
)
def test_real_annotations_have_the_stated_numbers(file, passes, counts):
    entries, report = read_annotations(SHARED / file, passes=passes)
    assert (len(entries), sum(len(entry.moments) for entry in entries)) == counts
    assert all(0 <= moment.start_s <= moment.end_s for entry in entries for moment in entry.moments)
    assert set(report.counts) <= {"overlapping", "out of order", "no time"}, "everything with a time is used"
