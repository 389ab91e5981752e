"""Ego4D Goal-Step: steps and substeps of procedures, as published.

Schema: https://ego4d-data.org/docs/data/annotations-schemas/. Videos are named by their uid.
"""

from collections.abc import Sequence
from pathlib import Path

from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.narration.parsing import Annotated, MomentReader, dicts, read_json

LEVELS = ("steps", "substeps")


def read_goalstep(path: Path, passes: Sequence[str], report: LoadReport) -> list[Annotated]:
    """`goalstep_<set>.json`: steps, and substeps inside them, with start and end; the passes are "steps" and
    "substeps". The test file has no times: all of it is counted as "no time".

    Raises:
        ValueError: another schema.
    """
    content = read_json(path)
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, list) or not all(isinstance(video, dict) and "video_uid" in video for video in videos):
        raise ValueError(
            f"{path}: not Ego4D's Goal-Step schema; expected {{'videos': [{{'video_uid': ..., 'segments': [...]}}]}}"
        )
    found = []
    for video in sorted(videos, key=lambda video: str(video["video_uid"])):
        uid = video["video_uid"]
        steps = dicts(video.get("segments", video.get("step_segments")), uid, report)
        records = {
            "steps": steps,
            "substeps": [sub for step in steps for sub in dicts(step.get("segments"), uid, report)],
        }
        for level in passes:
            reader = MomentReader(uid, report)
            for record in records[level]:
                text = record.get("step_description")
                reader.add(record.get("start_time"), record.get("end_time"), text)
            found.append(Annotated(uid, level, reader.done()))
    return found
