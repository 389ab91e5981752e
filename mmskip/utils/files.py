"""Atomic file writes: an interrupted write leaves the old content (of a folder at worst beside its place)."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path to write a file or folder to; it takes the place of `path` when the block ends without error,
    and is removed otherwise. Parent folders are made. Several processes may write the same path: the last one wins. A
    folder that stands there is moved aside first, to `.NAME.PID.old`, since nothing puts a folder in the place of a
    full one in one step; a process killed between the two steps leaves it there."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, before = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        yield partial
        if partial.is_dir() and target.is_dir():
            os.replace(target, before)
        os.replace(partial, target)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        if before.exists() and not target.exists():
            os.replace(before, target)
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def check_folder(path: str | Path) -> Path:
    """Return the path, if a folder is there or can be made there: asked before long work whose results go into it.

    Raises:
        ValueError: a file stands in the way, or the folder cannot be written to.
    """
    path = Path(path)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{path}: {there} is a file; give a folder for the results")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{path}: {there} cannot be written to; give another folder for the results")
    return path


def write_text(text: str, path: str | Path) -> Path:
    """Write a text file atomically; return the path."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(values: Any, path: str | Path, indent: int | None = 2) -> Path:
    """Write JSON atomically; return the path. JSON knows no infinity and no NaN: they become null, and an entry
    "not_finite" of a dict says where they stood (`{"metrics.lm_ppl": "inf"}`)."""
    found: dict[str, str] = {}
    values = _finite(values, "", found)
    if found and isinstance(values, dict):
        values = {**values, "not_finite": found}
    return write_text(json.dumps(values, indent=indent, allow_nan=False) + "\n", path)


class GrowingLines:
    """A file of JSON lines that keeps what was written if the process dies: `NAME.part`, one complete line at a time,
    until `close` gives it its name. What stood under the name stays until then; an earlier `.part` is overwritten.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(f"{self.path.name}.part")
        self._file = self._part.open("w", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Write one line; it is with the system, not in a buffer of the process, when this returns."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> Path:
        """Give the file its name; returns it."""
        self._file.close()
        os.replace(self._part, self.path)
        return self.path


def finite(value: Any) -> Any:
    """Return JSON-ready values with None in place of every number that is not finite."""
    return _finite(value, "", {})


def _finite(value: Any, place: str, found: dict[str, str]) -> Any:
    """`value` with None for every number that is not finite; these are noted in `found`."""
    if isinstance(value, float) and not math.isfinite(value):
        found[place] = str(value)
        return None
    if isinstance(value, dict):
        return {key: _finite(item, f"{place}.{key}" if place else str(key), found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{place}.{index}" if place else str(index), found) for index, item in enumerate(value)]
    return value
