"""The common form of all annotation formats: moments of videos, by annotator."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.narration.turns import Narration

MOMENTS = ("end", "start", "spoken")


@dataclass(frozen=True)
class Moment:
    """One annotated moment or segment of a video.

    Attributes:
        start_s, end_s: seconds from the start of the video, 0 <= start_s <= end_s; equal where only a time is given.
        text: plain words.
        spoken_s: when the annotator said it, if the format records it.
    """

    start_s: float
    end_s: float
    text: str
    spoken_s: float | None = None

    def narration(self, narrate_at: str | None) -> Narration:
        """The moment as a narration: at its "end", its "start", or when it was "spoken"; None: when it was spoken
        where that is known, else at its end."""
        time_s = self.start_s if narrate_at == "start" else self.end_s
        if narrate_at in (None, "spoken") and self.spoken_s is not None:
            time_s = self.spoken_s
        return Narration(time_s, self.text)


@dataclass(frozen=True)
class Annotated:
    """The moments of one annotator (or level) on one video, in the order of time.

    Attributes:
        uid: the video's uid.
        annotator: name of the pass, e.g. "narration_pass_1".
        moments: may be empty; then `empty` says why.
        names: further file names (without suffix) the video may have.
        whole: uid of a longer video this one is cut from, and the second at which it starts there.
        empty: reason for no moments.
    """

    uid: str
    annotator: str
    moments: tuple[Moment, ...]
    names: tuple[str, ...] = ()
    whole: tuple[str, float] | None = None
    empty: str = "no narrations"


@dataclass(frozen=True)
class NarratedVideo:
    """The narrations of one annotator on one video.

    Attributes:
        uid: the video's uid.
        path: the video file.
        narrations: sorted by time; at least one.
        annotator: name of the pass, e.g. "narration_pass_1".
    """

    uid: str
    path: Path
    narrations: tuple[Narration, ...]
    annotator: str = "narration_pass_1"


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: no such file, or not JSON in UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such narration file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error


def dicts(records: Any, uid: str, report: LoadReport) -> list[dict[str, Any]]:
    """The records of a list; other items are counted as "malformed". None stands for no records."""
    given = [] if records is None else records if isinstance(records, list) else [records]
    found = [record for record in given if isinstance(record, dict)] if isinstance(records, list) else []
    report.add("malformed", uid, len(given) - len(found))
    return found


def is_time(value: Any) -> bool:
    """Whether a value is a time: a finite number of seconds >= 0."""
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < math.inf


class MomentReader:
    """Collects the moments of one annotator on one video, and counts what cannot be used.

    Args:
        uid: of the video, for the report.
        report: where everything left out or mended is counted: "no time", "empty text", "ends before its start",
            "out of order" (sorted), "overlapping" (kept).
    """

    def __init__(self, uid: str, report: LoadReport) -> None:
        self.uid, self.report = uid, report
        self._moments: list[Moment] = []

    def add(self, start_s: Any, end_s: Any, text: Any, spoken_s: Any = None) -> None:
        """Take one record as the file has it."""
        if not isinstance(text, str | None):
            self.report.add("malformed", self.uid)
        elif not (is_time(start_s) and is_time(end_s)):
            self.report.add("no time", self.uid)
        elif not text or not text.strip():
            self.report.add("empty text", self.uid)
        elif end_s < start_s:
            self.report.add("ends before its start", self.uid)
        else:
            spoken = float(spoken_s) if is_time(spoken_s) else None
            self._moments.append(Moment(float(start_s), float(end_s), text.strip(), spoken))

    def done(self) -> tuple[Moment, ...]:
        """The usable moments, sorted by time."""
        pairs = list(pairwise(self._moments))
        ordered = sorted(self._moments, key=lambda moment: (moment.start_s, moment.end_s))
        self.report.add("out of order", self.uid, sum(later.start_s < earlier.start_s for earlier, later in pairs))
        overlaps = sum(later.start_s < earlier.end_s for earlier, later in pairwise(ordered))
        self.report.add("overlapping", self.uid, overlaps)
        return tuple(ordered)
