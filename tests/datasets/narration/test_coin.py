"""COIN's format, its five kinds of questions, and how an answer is judged."""

import json

import pytest

from mmskip.datasets.narration.formats.coin import (
    CoinData,
    correct_answers,
    edit_distances,
    nearest,
    questions,
    read_coin,
)


def video(name, subset, *steps, start=1.0, end=9.0):
    return {
        "class": name,
        "recipe_type": 12,
        "subset": subset,
        "start": start,
        "end": end,
        "duration": 10.0,
        "video_url": "",
        "annotation": [{"id": str(i), "segment": [a, b], "label": text} for i, (a, b, text) in enumerate(steps)],
    }


STEPS = [(1.0, 2.0, "open the box"), (2.5, 4.0, "take out the card"), (6.0, 8.0, "put in the card")]


def save(folder, **videos):
    path = folder / "COIN.json"
    path.write_text(json.dumps({"database": videos}))
    return path


def test_videos_are_read_with_their_steps_in_order(tmp_path):
    path = save(
        tmp_path,
        b=video("ReplaceSIMCard", "testing", *reversed(STEPS)),
        a=video("PutOnHairExtensions", "training", (3.0, 1.0, "backwards"), (1.0, 2.0, "")),
        c=video("InstallSSD", "training", STEPS[0], start=None),
    )
    videos, report = read_coin(path)
    assert [(v.uid, v.task, v.subset) for v in videos] == [
        ("b", "replace SIM card", "testing"),
        ("c", "install SSD", "training"),
    ]
    assert [step.text for step in videos[0].steps] == [text for *_, text in STEPS]
    assert (videos[1].start_s, videos[1].end_s) == (1.0, 9.0)
    assert report.counts == {"out of order": 2, "ends before its start": 1, "empty text": 1, "no steps": 1}


def test_five_kinds_of_questions(tmp_path):
    (coin,), _ = read_coin(save(tmp_path, v=video("ReplaceSIMCard", "testing", *STEPS)))
    asked = {item.uid: item for item in questions(coin)}
    assert list(asked) == [
        *("v/step/0", "v/step/1", "v/step/2", "v/task/0", "v/next/0", "v/next/1"),
        *("v/procedure/0", "v/procedure/1", "v/procedure+/0", "v/procedure+/1"),
    ]
    assert asked["v/step/1"].text == "Take out the card." and asked["v/next/1"].text == "Put in the card."
    assert (asked["v/next/0"].start_s, asked["v/next/0"].end_s) == (1.0, 2.0), "it watches the step before"
    assert asked["v/task/0"].text == "Replace SIM card." and asked["v/task/0"].end_s == 9.0
    assert asked["v/procedure/0"].text == "1. Take out the card.\n2. Put in the card."
    assert asked["v/procedure/1"].text == "Put in the card."
    assert "2 steps" in asked["v/procedure+/0"].question and "replace SIM card" in asked["v/procedure+/0"].question
    assert [item.task for item in questions(coin, ["task"])] == ["task"]


def test_a_procedure_has_at_most_five_steps(tmp_path):
    steps = [(float(i), i + 0.5, f"step {i}") for i in range(9)]
    (coin,), _ = read_coin(save(tmp_path, v=video("X", "testing", *steps)))
    counts = [len(item.answers) for item in questions(coin, ["procedure"])]
    assert counts == [5, 5, 5, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("same", "same", 0),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance(left, right, distance):
    assert edit_distances(left, [right, right + "x"])[0] == distance


CLASSES = ("open the box", "put in the card", "take out the card")


def test_an_answer_stands_for_the_nearest_class():
    assert nearest("Take out a card.", CLASSES) == "take out the card"
    assert nearest("2. PUT IN the card", CLASSES) == "put in the card"
    assert nearest("", CLASSES) == "open the box"


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        ("Open the box.", ["open the box"], [True]),
        ("Open the box.\nPut in the card.", ["put in the card"], [False]),  # one line is asked for: the first counts
        ("1. Open the box.\n\n2. Put in the card.", ["open the box", "put in the card"], [True, True]),
        ("2. Put in the card.\n1. Open the box.", ["open the box", "put in the card"], [False, False]),
        ("Open the box.", ["open the box", "put in the card"], [True, False]),
        ("", ["open the box"], [True]),  # the first class is as near as any
        ("", ["put in the card", "open the box"], [False, False]),
    ],
)
def test_answers_are_judged_in_their_places(said, answers, right):
    assert correct_answers(said, answers, CLASSES) == right


def test_files_of_another_schema_and_unknown_tasks_are_refused(tmp_path):
    for content in ([], {"database": []}, {"database": {"v": {"class": "X"}}}, {"videos": {}}):
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="not COIN's schema"):
            read_coin(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"tasks has stage; expected some of step, task"):
        CoinData(tasks=["stage"])
    with pytest.raises(ValueError, match="needs annotations"):
        CoinData()
