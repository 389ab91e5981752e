"""Find video files."""

from pathlib import Path

from mmskip.datasets.common.report import LoadReport

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif", ".m4v"}


def find_videos(folder: Path, report: LoadReport | None = None) -> dict[str, Path]:
    """The video files below a folder by name without suffix; of several with one name the first ("name used twice")."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in VIDEO_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found and report is not None:
            report.add("name used twice", str(path))
        found.setdefault(path.stem, path)
    return found
