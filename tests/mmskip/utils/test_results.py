"""Resumable results: what was measured is kept, and never mixed with results of other settings."""

import json

import pytest

from mmskip.utils.results import ResumableResults, differences, made_once


def test_a_result_is_made_once_and_survives_an_interruption(tmp_path):
    path, made = tmp_path / "a" / "r.json", []

    def make(value):
        def run():
            if value == 3:
                raise KeyboardInterrupt
            made.append(value)
            return value

        return run

    results = ResumableResults(path, {"seed": 1, "sizes": (1, 2)})
    assert results.once("one", make(1)) == 1
    assert results.once("two", make(2), part="speed") == 2
    with pytest.raises(KeyboardInterrupt):
        results.once("three", make(3))
    again = ResumableResults(path, {"sizes": [1, 2], "seed": 1})
    assert again.once("one", make(9)) == 1
    assert again.once("two", make(9), part="speed") == 2
    assert made == [1, 2]
    assert json.loads(path.read_text()) == {"settings": {"seed": 1, "sizes": [1, 2]}, "one": 1, "speed": {"two": 2}}


def test_two_processes_fill_one_file(tmp_path):
    first, second = (ResumableResults(tmp_path / "r.json") for _ in range(2))
    first.once("a", lambda: 1, part="p")
    second.once("b", lambda: 2, part="p")
    first.put({"c": 3})
    assert ResumableResults(tmp_path / "r.json").values == {"p": {"a": 1, "b": 2}, "c": 3}


def test_other_settings_are_refused_with_both_values(tmp_path):
    path = tmp_path / "r.json"
    ResumableResults(path, {"seed": 1, "split": "val"}).put({"a": 1})
    before = path.read_text()
    with pytest.raises(ValueError, match=r"other settings \(seed: 1 there, 2 now\); give another --out"):
        ResumableResults(path, {"seed": 2, "split": "val"}, remedy="give another --out")
    assert path.read_text() == before


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', '"text"', "3"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match="not a file of these results"):
        ResumableResults(tmp_path / "r.json", {"seed": 1})


def test_settings_are_compared_by_key():
    assert differences({"a": 1, "b": 2}, {"b": 2, "a": 1}) == ""
    assert differences({"a": 1}, {"b": 2}) == "a: 1 there, None now; b: None there, 2 now"


def test_a_file_is_made_once(tmp_path):
    calls = []
    for _ in range(2):
        assert made_once(tmp_path / "f.json", lambda: calls.append(1) or {"x": (1, 2)}) == {"x": [1, 2]}
    assert calls == [1]
