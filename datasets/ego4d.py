"""The Ego4D narration format, as published: one JSON of narrations, one folder of videos named by their uid.

Schema: https://ego4d-data.org/docs/data/annotations-schemas/ ("Narrations - narrations.json"). The uids stand at the
top of the file or under "videos"; each has "narration_pass_1", "narration_pass_2" (two annotators) and a "status".
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmskip.datasets.turns import Narration
from mmskip.datasets.video import VideoError, video_info

PASSES = ("narration_pass_1", "narration_pass_2")
_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif", ".m4v"}
_TAG = re.compile(r"#\s*\w+")


@dataclass(frozen=True)
class NarratedVideo:
    """The narrations of one annotator on one video.

    Attributes:
        uid: the video's uid.
        path: the video file.
        narrations: sorted by time; at least one.
        annotator: "narration_pass_1" or "narration_pass_2".
    """

    uid: str
    path: Path
    narrations: tuple[Narration, ...]
    annotator: str = PASSES[0]


@dataclass
class LoadReport:
    """What was left out or mended while loading, counted by reason; some names for each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count `count` cases of a reason; the first three examples are kept."""
        if count:
            self.counts[reason] += count
            names = self.examples.setdefault(reason, [])
            if len(names) < 3 and example not in names:
                names.append(example)

    def __str__(self) -> str:
        if not self.counts:
            return "nothing left out"
        return "; ".join(
            f"{reason}: {count} ({', '.join(self.examples[reason])}{', ...' if count > 3 else ''})"
            for reason, count in self.counts.most_common()
        )


def clean_text(text: str) -> str:
    """A narration without Ego4D's tags: "#C C opens a door #unsure" -> "C opens a door"."""
    return " ".join(_TAG.sub(" ", text).split())


def load_narrations(
    annotations: str | Path,
    video_dir: str | Path,
    passes: tuple[str, ...] = PASSES[:1],
    check_videos: bool = True,
) -> tuple[list[NarratedVideo], LoadReport]:
    """Load narrations and find their videos.

    Args:
        annotations: the JSON file, UTF-8.
        video_dir: folder with <uid>.mp4 (or another video suffix).
        passes: the annotators to use; each gives entries of its own.
        check_videos: read every video's packets to find broken files and narrations past the end. Without it both are
            found later, when the video is encoded.

    Returns:
        The usable entries by uid, and a report of what was left out (whole videos: "redacted", "no narrations", "video
        missing", "corrupt video"; videos in the folder that nobody narrates: "video without narration"; single
        narrations: "empty text", "no time", "past the end") or mended ("out of order": sorted).

    Raises:
        ValueError: no such file or folder, not JSON, not this schema, or nothing usable.
    """
    annotations, video_dir = Path(annotations), Path(video_dir)
    if not video_dir.is_dir():
        raise ValueError(f"{video_dir}: no such folder of videos")
    videos = _read(annotations)
    files = {path.stem: path for path in sorted(video_dir.iterdir()) if path.suffix.lower() in _SUFFIXES}
    report = LoadReport()
    for uid in sorted(files.keys() - videos.keys()):
        report.add("video without narration", uid)
    loaded: list[NarratedVideo] = []
    for uid, entry in sorted(videos.items()):
        found = list(_passes(uid, entry, passes, report))
        if not found:
            redacted = "redacted" in str(entry.get("status", "")).lower()
            report.add("redacted" if redacted else "no narrations", uid)
            continue
        path = files.get(uid)
        if path is None:
            report.add("video missing", uid)
            continue
        duration = float("inf")
        if check_videos:
            try:
                duration = video_info(path).duration_s
            except VideoError as error:
                report.add("corrupt video", str(error))
                continue
        for name, narrations in found:
            inside = tuple(narration for narration in narrations if narration.time_s <= duration)
            report.add("past the end", uid, len(narrations) - len(inside))
            if inside:
                loaded.append(NarratedVideo(uid, path, inside, name))
            else:
                report.add("no narrations", uid)
    if not loaded:
        raise ValueError(
            f"{annotations} with videos in {video_dir}: no narrated video is usable ({report}); "
            "videos must be named <video uid>.mp4"
        )
    return loaded, report


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The uid -> entry table of a narration file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such narration file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    videos = content.get("videos", content) if isinstance(content, dict) else None
    if not isinstance(videos, dict) or not any(_is_entry(entry) for entry in videos.values()):
        raise ValueError(
            f"{path}: not Ego4D's narration schema; expected {{uid: {{'narration_pass_1': {{'narrations': [...]}}, "
            "'status': ...}}} at the top or under 'videos'"
        )
    return {uid: entry for uid, entry in videos.items() if isinstance(entry, dict)}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and ("status" in entry or any(name in entry for name in PASSES))


def _passes(
    uid: str, entry: dict[str, Any], passes: tuple[str, ...], report: LoadReport
) -> Iterator[tuple[str, list[Narration]]]:
    """The sorted narrations of each pass that holds any."""
    for name in passes:
        records = (entry.get(name) or {}).get("narrations") or []
        narrations = []
        for record in records:
            if not isinstance(record, dict) or not isinstance(record.get("narration_text", ""), str | None):
                report.add("malformed", uid)
                continue
            text, time_s = record.get("narration_text"), record.get("timestamp_sec")
            if isinstance(time_s, bool) or not isinstance(time_s, int | float) or not 0 <= time_s < math.inf:
                report.add("no time", uid)
            elif not text or not clean_text(text):
                report.add("empty text", uid)
            else:
                narrations.append(Narration(float(time_s), clean_text(text)))
        pairs = pairwise(narrations)
        report.add("out of order", uid, sum(later.time_s < earlier.time_s for earlier, later in pairs))
        if narrations:
            yield name, sorted(narrations, key=lambda narration: narration.time_s)
