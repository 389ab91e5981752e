"""EPIC-KITCHENS-100 narrations, as published: `EPIC_100_<set>.csv`, videos named by `video_id`.

Columns: https://github.com/epic-kitchens/epic-kitchens-100-annotations.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.narration.parsing import Annotated, MomentReader

_COLUMNS = ("video_id", "narration_timestamp", "start_timestamp", "stop_timestamp", "narration")


def read_epic(path: Path, passes: Sequence[str], report: LoadReport) -> list[Annotated]:
    """The action segments of each video, with the time at which the narrator spoke.

    Raises:
        ValueError: no such file, or columns are missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such narration file")
    readers: dict[str, MomentReader] = {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        missing = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: not EPIC-KITCHENS' columns; missing: {', '.join(missing)}")
        for row in rows:
            reader = readers.setdefault(row["video_id"], MomentReader(row["video_id"], report))
            start, stop, spoken = (_seconds(row[key]) for key in ("start_timestamp", "stop_timestamp", _COLUMNS[1]))
            reader.add(start, stop, row["narration"], spoken)
    return [Annotated(uid, "narrations", reader.done()) for uid, reader in sorted(readers.items())]


def _seconds(clock: str | None) -> float | None:
    """ "00:01:02.50" in seconds; None where it is no time."""
    try:
        hours, minutes, seconds = (clock or "").split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None
