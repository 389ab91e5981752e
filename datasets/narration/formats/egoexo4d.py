"""EgoExo4D's atomic action descriptions, as published: `atomic_descriptions_<set>.json`.

Schema: https://docs.ego-exo4d-data.org/annotations/atomic_descriptions. Videos are named by `take_uid`, or by
`take_name` where EgoExo4D's `takes.json` lies in the folder of the annotations.
"""

from collections.abc import Sequence
from pathlib import Path

from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.narration.formats.ego4d import clean_text
from mmskip.datasets.narration.parsing import Annotated, MomentReader, dicts, read_json


def read_descriptions(path: Path, passes: Sequence[str], report: LoadReport) -> list[Annotated]:
    """The descriptions of each take: `annotations[take_uid]` lists annotators, each with timed `descriptions`.

    Passes are "annotator_1", "annotator_2", ... in the order of the file. Rejected annotations ("rejected") and
    descriptions whose annotator was unsure ("unsure") are left out.

    Raises:
        ValueError: another schema.
    """
    content = read_json(path)
    takes = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(takes, dict) or not all(isinstance(annotators, list) for annotators in takes.values()):
        raise ValueError(
            f"{path}: not EgoExo4D's schema; expected {{'annotations': {{take_uid: [{{'descriptions': [...]}}]}}}}"
        )
    names = _take_names(path.parent / "takes.json")
    found = []
    for uid, annotators in sorted(takes.items()):
        known = dicts(annotators, uid, report)
        usable = [annotator for annotator in known if not annotator.get("rejected")]
        report.add("rejected", uid, len(known) - len(usable))
        for name in passes:
            number = int(name.rpartition("_")[2])
            reader = MomentReader(uid, report)
            records = usable[number - 1].get("descriptions") if number <= len(usable) else None
            for record in dicts(records, uid, report):
                if record.get("unsure"):
                    report.add("unsure", uid)
                    continue
                time_s = record.get("timestamp")
                reader.add(time_s, time_s, clean_text(record.get("text")))
            empty = "rejected by its annotators" if known and not usable else "no narrations"
            found.append(Annotated(uid, name, reader.done(), names.get(uid, ()), empty=empty))
    return found


def _take_names(path: Path) -> dict[str, tuple[str, ...]]:
    """File names of each take by its uid; empty without takes.json."""
    if not path.is_file():
        return {}
    takes = read_json(path)
    if not isinstance(takes, list) or not all(
        isinstance(t, dict) and {"take_uid", "take_name"} <= set(t) for t in takes
    ):
        raise ValueError(f"{path}: not EgoExo4D's list of takes; expected [{{'take_uid': ..., 'take_name': ...}}]")
    return {take["take_uid"]: (take["take_name"],) for take in takes}
