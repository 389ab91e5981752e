"""The report of a run: its texts, and which runs it compares."""

import math

import pytest

from mmskip.datasets.narration.turns import TurnSpan
from mmskip.train.reports import text as report
from mmskip.train.reports.narration import NarrationReport
from mmskip.utils.files import write_json


def results(name: str, ppl: float, task: str = "t", measured: float | None = 2.0) -> dict:
    savings = {"training_step": {"flops": 6.0, "dense_flops": 10.0}}
    if measured:
        savings["measured"] = {"speedup": measured}
    metrics = {"model": {"lm_ppl": ppl}}
    methods = [] if name == "dense" else [{}]
    return {
        "name": name,
        "label": "x",
        "stage": "val",
        "task": task,
        "methods": methods,
        "metrics": metrics,
        "savings": savings,
    }


def test_narrations_stand_beside_the_truth_at_their_times():
    turns = [
        TurnSpan((1, 3), (5, 8), (9, 12), "red circle enters", 2.0),
        TurnSpan((3, 5), (1, 2), (3, 4), "it hides", 3.0),
    ]
    lines = report.narration_lines("v", turns, [(1, "a star"), (4, "it hides")], start_s=1.0, fps=2.0).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["1.5", "s", "a", "star"],
        ["2.0", "s", "red", "circle", "enters"],
        ["3.0", "s", "it", "hides", "it", "hides"],
    ]
    assert lines[2].index("a star") == lines[4].rindex("it hides")  # one column


def test_points_are_the_newest_run_of_each_name_on_the_same_samples(tmp_path):
    for name, time, ppl, task in (
        ("dense", "1", 3.0, "t"),
        ("dense", "2", 2.5, "t"),
        ("random", "1", 4.0, "t"),
        ("other_data", "1", 1.0, "u"),
        ("own", "1", 9.0, "t"),
    ):
        write_json(
            results(name, ppl, task, None if name in ("random", "dense") else 1.0),
            tmp_path / name / time / "results.json",
        )
    write_json({"name": "vlm", "metrics": {"loss": 1.0}}, tmp_path / "vlm" / "1" / "results.json")  # of another module
    own = results("own", 2.6)
    points = report.comparable_points(own, tmp_path / "own" / "2", tmp_path)
    found = {point["label"]: (point["value"], point["counted"], point["measured"]) for point in points}
    assert found == {"dense (x)": (2.5, 0.6, 1.0), "random (x)": (4.0, 0.6, None), "own (x)": (2.6, 0.6, 0.5)}
    assert [point["label"] for point in points if point.get("highlight")] == ["own (x)"]


def test_a_task_is_known_by_its_data_not_by_its_tokens():
    turn = TurnSpan((1, 3), (5, 8), (9, 12), "red circle enters", 1.0)
    own = report.task_id([("v", (turn,))])
    assert own == report.task_id([("v", (turn.shifted(7),))])
    for other in (turn._replace(narration="it hides"), turn._replace(time_s=0.9), turn._replace(frames=(1, 2))):
        assert own != report.task_id([("v", (other,))])
    assert own != report.task_id([("w", (turn,))])


def test_a_hopeless_run_is_not_drawn(tmp_path):
    write_json(results("hopeless", math.inf), tmp_path / "hopeless" / "1" / "results.json")
    own = report.comparable_points(results("own", 2.0), tmp_path / "own" / "1", tmp_path)
    assert [point["label"] for point in own] == ["own (x)"]
    assert report.comparable_points(results("own", math.inf), tmp_path / "own" / "1", tmp_path) == []


def test_labels_say_what_differs():
    assert report.model_label([]) == "dense"
    method = {"class_path": "mmskip.MoDConfig", "init_args": {"keep": 0.2, "router": "random", "seed": 0}}
    assert report.model_label([method]) == "MoD keep=0.2 router=random"


def test_report_refuses_impossible_numbers():
    with pytest.raises(ValueError, match="samples >= 1"):
        NarrationReport(samples=0)
