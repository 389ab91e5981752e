"""SNLI-VE: does an image entail a sentence? JSON lines, one pair per line.

| what | key |
|---|---|
| image | `Flickr30K_ID` or `Flikr30kID` (both are in circulation), or e-SNLI-VE's `image_id` |
| hypothesis | `sentence2`, or e-SNLI-VE's `hypothesis` |
| label | `gold_label` ("-": the annotators did not agree), or `label` |
| name of the pair | `pairID`, or `pair_id` |
| caption of the image | `sentence1`, where there is one |
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmskip.datasets.captioning.coco import readable
from mmskip.datasets.common.labels import ENTAILMENT as LABELS
from mmskip.datasets.common.report import LoadReport

_KEYS = {
    "image": ("Flickr30K_ID", "Flikr30kID", "image_id"),
    "hypothesis": ("sentence2", "hypothesis"),
    "label": ("gold_label", "label"),
    "pair": ("pairID", "pair_id"),
}


@dataclass(frozen=True)
class EntailmentPair:
    """An image and a sentence.

    Attributes:
        uid: name of the pair.
        file: name of the image file.
        hypothesis: the sentence.
        label: one of `LABELS`.
        caption: of the image, where the file has one.
        path: the image file, once it was found.
    """

    uid: str
    file: str
    hypothesis: str
    label: str
    caption: str | None = None
    path: Path | None = None


def read_pairs(path: str | Path) -> tuple[list[EntailmentPair], LoadReport]:
    """The pairs of a file, in its order.

    Returns:
        The pairs, and the report of those left out: "no gold label", "empty hypothesis".

    Raises:
        ValueError: no such file, a line that is not a pair, another label, a pair twice, or nothing usable.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    report, found = LoadReport(), dict[str, EntailmentPair]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        pair = _pair(line, f"{path}, line {number}")
        if pair.label == "-":
            report.add("no gold label", pair.uid)
        elif not pair.hypothesis:
            report.add("empty hypothesis", pair.uid)
        elif pair.uid in found:
            raise ValueError(f"{path}, line {number}: pair {pair.uid} is there twice.")
        else:
            found[pair.uid] = pair
    if not found:
        raise ValueError(f"{path} holds no usable pair ({report}).")
    return list(found.values()), report


def _pair(line: str, place: str) -> EntailmentPair:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {line[:60]}; expected a JSON object.")
    values = {name: _value(row, name, place) for name in _KEYS}
    if values["label"] not in (*LABELS, "-"):
        raise ValueError(f"{place}: label {values['label']!r}; expected {', '.join(LABELS)} or '-'.")
    file = values["image"] if Path(values["image"]).suffix else f"{values['image']}.jpg"
    caption = row.get("sentence1")
    return EntailmentPair(values["pair"], file, values["hypothesis"].strip(), values["label"], caption)


def _value(row: dict[str, Any], name: str, place: str) -> str:
    for key in _KEYS[name]:
        if key in row:
            return str(row[key])
    raise ValueError(f"{place} has no {name}; expected one of the keys {', '.join(_KEYS[name])}.")


def find_pair_images(
    pairs: Iterable[EntailmentPair], folder: str | Path, report: LoadReport, check: bool = True
) -> list[EntailmentPair]:
    """The pairs whose image is there, with its path; every image is looked at once.

    Args:
        pairs: as read by `read_pairs`.
        folder: of image files.
        report: counts, by pair, "image missing" and "image not readable".
        check: decode every image now.

    Raises:
        ValueError: no such folder, or no usable pair.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    trouble: dict[str, str | None] = {}
    found = []
    for pair in pairs:
        path = folder / pair.file
        if pair.file not in trouble:
            missing = "image missing" if not path.is_file() else None
            trouble[pair.file] = missing or ("image not readable" if check and not readable(path) else None)
        reason = trouble[pair.file]
        if reason:
            report.add(reason, pair.file)
        else:
            found.append(replace(pair, path=path))
    if not found:
        raise ValueError(f"{folder} holds no usable image of the pairs ({report}).")
    return found
