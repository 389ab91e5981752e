"""Narrated videos of any known format: annotations are read, videos are found, what cannot be used is counted.

| format | file | passes (the first is the default) |
|---|---|---|
| `ego4d` | Ego4D `narrations.json` | `narration_pass_1`, `narration_pass_2` |
| `ego4d_lta` | Ego4D `fho_lta_<set>.json` | `actions` |
| `goalstep` | Ego4D `goalstep_<set>.json` | `steps`, `substeps` |
| `egoexo4d` | EgoExo4D `atomic_descriptions_<set>.json` | `annotator_1`, `annotator_2`, ... |
| `epic_kitchens` | EPIC-KITCHENS-100 CSV | `narrations` |
"""

import math
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.narration.formats.ego4d import PASSES, outside, read_lta, read_narrations, read_redactions
from mmskip.datasets.narration.formats.egoexo4d import read_descriptions
from mmskip.datasets.narration.formats.epic_kitchens import read_epic
from mmskip.datasets.narration.formats.goal_step import LEVELS, read_goalstep
from mmskip.datasets.narration.parsing import MOMENTS, Annotated, Moment, NarratedVideo, read_json
from mmskip.datasets.video.files import find_videos
from mmskip.datasets.video.reader import VideoError, video_info


@dataclass(frozen=True)
class Format:
    """One annotation format: its reader, and the names its passes may have (a pattern) with the default first."""

    read: Callable[[Path, Sequence[str], LoadReport], list[Annotated]]
    default: str
    passes: str


FORMATS = {
    "ego4d": Format(read_narrations, PASSES[0], "|".join(PASSES)),
    "ego4d_lta": Format(read_lta, "actions", "actions"),
    "goalstep": Format(read_goalstep, LEVELS[0], "|".join(LEVELS)),
    "egoexo4d": Format(read_descriptions, "annotator_1", r"annotator_[1-9]\d*"),
    "epic_kitchens": Format(read_epic, "narrations", "narrations"),
}


def detect_format(path: str | Path) -> str:
    """The format of an annotation file, from its suffix and its top-level keys.

    Raises:
        ValueError: no such file, not JSON, or COIN's (which asks questions and has a separate reader).
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return "epic_kitchens"
    content = read_json(path)
    keys = content if isinstance(content, dict) else {}
    if "database" in keys:
        raise ValueError(f"{path} looks like COIN's annotations; use mmskip.datasets.narration.CoinData for them")
    if isinstance(keys.get("clips"), list):
        return "ego4d_lta"
    if isinstance(keys.get("annotations"), dict):
        return "egoexo4d"
    return "goalstep" if isinstance(keys.get("videos"), list) and keys["videos"] else "ego4d"


def check_format(name: str, passes: Sequence[str] | None, narrate_at: str | None) -> None:
    """Raise ValueError for a format, pass or moment that does not exist ("auto" stands for any format)."""
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"format is {name!r}; expected auto or one of {', '.join(FORMATS)}")
    known = [form for key, form in FORMATS.items() if name in ("auto", key)]
    for given in passes or ():
        if not any(re.fullmatch(form.passes, given) for form in known):
            raise ValueError(
                f"narration_passes has {given!r}; format {name!r} knows {', '.join(form.passes for form in known)}"
            )
    if narrate_at is not None and narrate_at not in MOMENTS:
        raise ValueError(f"narrate_at is {narrate_at!r}; expected one of {', '.join(MOMENTS)}, or null")


def read_annotations(
    path: str | Path, format: str = "auto", passes: Sequence[str] | None = None
) -> tuple[list[Annotated], LoadReport]:
    """Read an annotation file, without looking for videos.

    Args:
        path: the file, UTF-8.
        format: a key of `FORMATS`, or "auto".
        passes: the annotators or levels to use; None: the format's first.

    Returns:
        One entry per video and pass, by uid (empty ones too), and a report of what was left out ("empty text",
        "no time", "malformed", "ends before its start", "rejected", "unsure") or mended ("out of order": sorted;
        "overlapping": kept).

    Raises:
        ValueError: no such file, another schema, or a pass the format does not know.
    """
    name = detect_format(path) if format == "auto" else format
    check_format(name, passes, None)
    report = LoadReport()
    return FORMATS[name].read(Path(path), tuple(passes or [FORMATS[name].default]), report), report


def load_narrations(
    annotations: str | Path,
    video_dir: str | Path,
    passes: Sequence[str] | None = None,
    check_videos: bool = True,
    format: str = "auto",
    narrate_at: str | None = None,
    redactions: str | Path | None = None,
    encoded: Container[str] = (),
) -> tuple[list[NarratedVideo], LoadReport]:
    """Load narrations and find their videos.

    Args:
        annotations: the file, UTF-8.
        video_dir: folder with <uid>.mp4 (or another video suffix), at any depth.
        passes: as for `read_annotations`; each gives separate entries.
        check_videos: read every video's packets to find broken files and narrations past the end. Without it both are
            found later, when the video is encoded.
        format: as for `read_annotations`.
        narrate_at: when a segment is narrated: at its "end", its "start", or when the annotator has "spoken"
            (EPIC-KITCHENS); None: when spoken where that is known, else at the end.
        redactions: Ego4D's `ego4d.json`; narrations that touch a redacted interval are left out.
        encoded: uids whose features exist already: their video files may be missing.

    Returns:
        The usable entries by uid, and the report of `read_annotations` with, in addition, complete videos left out
        ("redacted", "no narrations", "video missing", "corrupt video"), videos in the folder that nobody narrates
        ("video without narration"), and single narrations ("past the end", "in a redacted interval").

    Raises:
        ValueError: no such file or folder, another schema, or nothing usable.
    """
    annotations, video_dir = Path(annotations), Path(video_dir)
    check_format(format, None, narrate_at)
    if not video_dir.is_dir():
        raise ValueError(f"{video_dir}: no such folder of videos")
    entries, report = read_annotations(annotations, format, passes)
    if redactions is not None:
        entries = _redacted(entries, read_redactions(Path(redactions)), report)
    files = find_videos(video_dir, report)
    _count_unpaired(entries, files, report)
    finder = _Finder(files, video_dir, encoded, check_videos, report)
    located = finder.located([entry for entry in entries if entry.moments])
    loaded = [video for entry in located if (video := _narrated(entry, finder, narrate_at)) is not None]
    if not loaded:
        raise ValueError(
            f"{annotations} with videos in {video_dir}: no narrated video is usable ({report}); "
            "videos must be named <video uid>.mp4"
        )
    return loaded, report


def _count_unpaired(entries: Sequence[Annotated], files: Iterable[str], report: LoadReport) -> None:
    """Count videos that nobody narrates, and entries without narrations."""
    named = {name for entry in entries for name in (entry.uid, *entry.names, *(entry.whole or ())[:1])}
    for uid in sorted(set(files) - named):
        report.add("video without narration", uid)
    narrated = {entry.uid for entry in entries if entry.moments}
    for uid, reason in {entry.uid: entry.empty for entry in entries if entry.uid not in narrated}.items():
        report.add(reason, uid)


def _narrated(entry: Annotated, finder: "_Finder", narrate_at: str | None) -> NarratedVideo | None:
    """An entry with its video; None, and counted, where there is no video or it has no narrations."""
    found = finder.find(entry)
    if found is None:
        return None
    path, duration_s = found
    narrations = [moment.narration(narrate_at) for moment in entry.moments]
    inside = sorted((n for n in narrations if n.time_s <= duration_s), key=lambda narration: narration.time_s)
    finder.report.add("past the end", entry.uid, len(narrations) - len(inside))
    if not inside:
        finder.report.add("no narrations", entry.uid)
        return None
    return NarratedVideo(entry.uid, path, tuple(inside), entry.annotator)


class _Finder:
    """Finds the video of each entry, and looks at a file once."""

    def __init__(
        self, files: dict[str, Path], folder: Path, encoded: Container[str], check: bool, report: LoadReport
    ) -> None:
        self.files, self.folder, self.encoded, self.check, self.report = files, folder, encoded, check, report
        self._durations: dict[Path, float | None] = {}

    def _known(self, uid: str) -> bool:
        return uid in self.files or uid in self.encoded

    def located(self, entries: Iterable[Annotated]) -> list[Annotated]:
        """The entries; those cut from a longer video are put together on it where only the longer one is there."""
        moments: dict[tuple[str, str], list[Moment]] = {}
        plain = []
        for entry in entries:
            if entry.whole is None or self._known(entry.uid) or not self._known(entry.whole[0]):
                plain.append(entry)
                continue
            uid, by = entry.whole
            moved = [Moment(moment.start_s + by, moment.end_s + by, moment.text) for moment in entry.moments]
            moments.setdefault((uid, entry.annotator), []).extend(moved)
        for (uid, annotator), parts in moments.items():
            ordered = sorted(set(parts), key=lambda moment: (moment.start_s, moment.end_s))
            plain.append(Annotated(uid, annotator, tuple(ordered)))
        return sorted(plain, key=lambda entry: (entry.uid, entry.annotator))

    def find(self, entry: Annotated) -> tuple[Path, float] | None:
        """File and seconds of the entry's video (infinity where nobody looked); None, and counted, where there is
        none."""
        path = next((self.files[name] for name in (entry.uid, *entry.names) if name in self.files), None)
        if path is None:
            if entry.uid in self.encoded:
                return self.folder / f"{entry.uid}.mp4", math.inf
            self.report.add("video missing", entry.uid)
            return None
        if path not in self._durations:
            self._durations[path] = _duration(path, self.report) if self.check else math.inf
        duration_s = self._durations[path]
        return None if duration_s is None else (path, duration_s)


def _redacted(
    entries: Iterable[Annotated], intervals: dict[str, list[tuple[float, float]]], report: LoadReport
) -> list[Annotated]:
    found = []
    for entry in entries:
        # intervals are those of the full video, also where an entry is a clip of it
        uid, start_s = entry.whole or (entry.uid, 0.0)
        own = [(begin - start_s, end - start_s) for begin, end in intervals.get(uid, ())]
        kept = outside(entry.moments, own)
        report.add("in a redacted interval", entry.uid, len(entry.moments) - len(kept))
        empty = "redacted" if entry.moments else entry.empty
        found.append(Annotated(entry.uid, entry.annotator, kept, entry.names, entry.whole, empty))
    return found


def _duration(path: Path, report: LoadReport) -> float | None:
    """Seconds of a video; None, and counted, where it is broken."""
    try:
        return video_info(path).duration_s
    except VideoError as error:
        report.add("corrupt video", str(error))
        return None
