"""Ego4D's annotation formats, as published: narrations and long-term anticipation. For Goal-Step see
`goal_step`.

Schemas: https://ego4d-data.org/docs/data/annotations-schemas/. Videos are named by their uid.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.narration.parsing import Annotated, Moment, MomentReader, dicts, is_time, read_json

PASSES = ("narration_pass_1", "narration_pass_2")
_TAG = re.compile(r"#\s*\w+")
_ASIDE = re.compile(r"_*\([^)]*\)")


def clean_text(text: Any) -> Any:
    """A narration without Ego4D's tags: "#C C opens a door #unsure" -> "C opens a door"; other values unchanged."""
    return " ".join(_TAG.sub(" ", text).split()) if isinstance(text, str) else text


def read_narrations(path: Path, passes: Sequence[str], report: LoadReport) -> list[Annotated]:
    """`narrations.json`: the uids stand at the top of the file or under "videos"; each has "narration_pass_1",
    "narration_pass_2" (two annotators) and a "status", which marks a redacted video.

    Raises:
        ValueError: another schema.
    """
    content = read_json(path)
    videos = content.get("videos", content) if isinstance(content, dict) else None
    if not isinstance(videos, dict) or not any(_is_entry(entry) for entry in videos.values()):
        raise ValueError(
            f"{path}: not Ego4D's narration schema; expected {{uid: {{'narration_pass_1': {{'narrations': [...]}}, "
            "'status': ...}} at the top or under 'videos'"
        )
    found = []
    for uid, entry in sorted(videos.items()):
        if not isinstance(entry, dict):
            continue
        redacted = "redacted" in str(entry.get("status", "")).lower()
        for name in passes:
            reader = MomentReader(uid, report)
            passed = next(iter(dicts([entry[name]] if entry.get(name) else None, uid, report)), {})
            for record in dicts(passed.get("narrations"), uid, report):
                time_s = record.get("timestamp_sec")
                reader.add(time_s, time_s, clean_text(record.get("narration_text")))
            empty = "redacted" if redacted else "no narrations"
            found.append(Annotated(uid, name, reader.done(), empty=empty))
    return found


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and ("status" in entry or any(name in entry for name in PASSES))


def read_lta(path: Path, passes: Sequence[str], report: LoadReport) -> list[Annotated]:
    """`fho_lta_<set>.json` (long-term anticipation): actions as "verb noun" with their times in a clip. The clips
    may be separate files (named by `clip_uid`) or parts of the full video (`video_uid`).

    Raises:
        ValueError: another schema.
    """
    content = read_json(path)
    records = content.get("clips") if isinstance(content, dict) else None
    if not isinstance(records, list) or not any(isinstance(r, dict) and "clip_uid" in r for r in records):
        raise ValueError(f"{path}: not Ego4D's fho_lta schema; expected {{'clips': [{{'clip_uid': ..., ...}}]}}")
    readers: dict[str, MomentReader] = {}
    whole: dict[str, tuple[str, float]] = {}
    for record in dicts(records, str(path), report):
        uid = record.get("clip_uid")
        if not isinstance(uid, str):
            report.add("malformed", str(path))
            continue
        parent, start_s = record.get("video_uid"), record.get("clip_parent_start_sec")
        if isinstance(parent, str) and is_time(start_s):
            whole[uid] = (parent, float(start_s or 0))
        words = [_plain(record.get(key)) for key in ("verb", "noun")]
        text = " ".join(words) if all(words) else ""
        reader = readers.setdefault(uid, MomentReader(uid, report))
        reader.add(record.get("action_clip_start_sec"), record.get("action_clip_end_sec"), text)
    return [Annotated(uid, "actions", reader.done(), whole=whole.get(uid)) for uid, reader in sorted(readers.items())]


def _plain(label: Any) -> str:
    """Words of a taxonomy label: "turn_on_(switch_on,_start)" -> "turn on"."""
    return " ".join(_ASIDE.sub("", label).replace("_", " ").split()) if isinstance(label, str) else ""


def read_redactions(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The redacted intervals (seconds) of every video, from Ego4D's metadata file `ego4d.json`.

    Raises:
        ValueError: no such file, or another schema.
    """
    content = read_json(path)
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, list) or not all(isinstance(video, dict) and "video_uid" in video for video in videos):
        raise ValueError(f"{path}: not Ego4D's metadata schema; expected {{'videos': [{{'video_uid': ...}}]}}")
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for video in videos:
        for interval in video.get("redacted_intervals") or []:
            start_s, end_s = interval.get("start_sec"), interval.get("end_sec")
            if not (is_time(start_s) and is_time(end_s)):
                raise ValueError(f"{path}: redacted interval without times in {video['video_uid']}: {interval}")
            found[video["video_uid"]].append((float(start_s), float(end_s)))
    return dict(found)


def outside(moments: Sequence[Moment], intervals: Sequence[tuple[float, float]]) -> tuple[Moment, ...]:
    """The moments that touch none of the intervals."""
    return tuple(
        moment
        for moment in moments
        if not any(moment.start_s <= end and moment.end_s >= start for start, end in intervals)
    )
