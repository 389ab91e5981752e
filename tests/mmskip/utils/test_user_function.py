"""Factories that a user gives as FILE.py:FUNCTION."""

import sys

import pytest

from mmskip.utils.user_function import call_function

FILE = """
from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar


@dataclass
class Box:
    kind: ClassVar[str] = "box"
    size: int = 1
    _: KW_ONLY
    color: str = "red"


def one():
    return Box()


def same():
    return Box(2, color="blue")
"""


def test_two_functions_of_one_file_share_its_classes(tmp_path):
    file = tmp_path / "boxes.py"
    file.write_text(FILE)
    one, other = call_function(file, "one"), call_function(file, "same")
    assert type(one) is type(other)
    assert (one.color, other.size, other.kind) == ("red", 2, "box")


def test_files_of_one_name_are_told_apart_and_hide_no_library(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "json.py").write_text(f"def which():\n    return {name!r}\n")
    json = sys.modules["json"]
    assert [call_function(tmp_path / name / "json.py", "which") for name in ("a", "b", "a")] == ["a", "b", "a"]
    assert sys.modules["json"] is json


def test_a_file_that_fails_is_run_again(tmp_path):
    file = tmp_path / "half.py"
    file.write_text("raise RuntimeError('half-way')")
    with pytest.raises(RuntimeError, match="half-way"):
        call_function(file, "f")
    file.write_text("def f():\n    return 3\n# longer than before")
    assert call_function(file, "f") == 3


@pytest.mark.parametrize(("name", "function"), [("gone.py", "f"), ("there.py", "g"), ("there.py", "")])
def test_what_is_missing_is_named(tmp_path, name, function):
    (tmp_path / "there.py").write_text("def f():\n    return 1\n")
    with pytest.raises(ValueError, match=name):
        call_function(tmp_path / name, function)
