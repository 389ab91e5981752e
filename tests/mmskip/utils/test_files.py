import json
import math
import os

import pytest

from mmskip.utils.files import atomic_path, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupted(path, write):
    with atomic_path(path) as partial:
        write(partial)
        raise KeyboardInterrupt


def test_a_write_that_fails_leaves_the_file_before_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "made" / "results.json"
    write_json({"x": 1}, path)
    with pytest.raises(KeyboardInterrupt):
        interrupted(path, lambda partial: partial.write_text("half"))
    with pytest.raises(TypeError):
        write_json({"x": object()}, path)
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text("x", path)
    assert json.loads(path.read_text()) == {"x": 1} and names(path.parent) == ["results.json"]


def test_numbers_json_does_not_know_are_null_and_named(tmp_path):
    path = write_json({"metrics": {"ppl": math.inf, "list": [1.0, math.nan]}, "x": 1}, tmp_path / "a.json")
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name)) == {
        "metrics": {"ppl": None, "list": [1.0, None]},
        "x": 1,
        "not_finite": {"metrics.ppl": "inf", "metrics.list.1": "nan"},
    }


def test_a_folder_is_moved_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "folder", lambda partial: partial.mkdir())
    assert names(tmp_path) == []
    with atomic_path(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a.txt").write_text("a")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["a.txt"]
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "folder", lambda partial: partial.mkdir())
    assert names(tmp_path / "folder") == ["a.txt"]
    with atomic_path(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "b.txt").write_text("b")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["b.txt"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    move, moves = os.replace, []

    def fails_once(source, target):
        moves.append(source)
        if len(moves) == 2:
            raise OSError("disk full")
        move(source, target)

    monkeypatch.setattr("os.replace", fails_once)
    with pytest.raises(OSError, match="disk full"), atomic_path(tmp_path / "folder") as partial:
        partial.mkdir()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["a.txt"]
