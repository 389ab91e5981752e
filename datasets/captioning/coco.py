"""COCO captions: annotation files, result files and their images.

Annotations are either COCO's (2014 and 2017: `{"images": [{"id", "file_name"}], "annotations": [{"image_id",
"caption"}]}`) or Karpathy's `dataset_coco.json`, which holds the split of every image. Results are COCO's
`[{"image_id": int, "caption": str}]` with exactly one caption per image.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmskip.datasets.common.report import LoadReport
from mmskip.utils.files import write_json

KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
"""The usual reading of the splits in Karpathy's file: `restval` is trained on."""


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its captions.

    Attributes:
        image_id: COCO's number.
        file: name as the annotations have it; empty where they name none.
        captions: at least one, stripped.
        path: the file, once it was found.
    """

    image_id: int
    file: str
    captions: tuple[str, ...]
    path: Path | None = None


def read_captions(path: str | Path, split: str | None = None) -> tuple[list[CaptionedImage], LoadReport]:
    """The captioned images of an annotation file, in the order of its images.

    Args:
        path: COCO's or Karpathy's JSON.
        split: "train", "val" or "test" of Karpathy's file ("train" holds its `restval`); None: all of the file.

    Returns:
        The images, and the report of what was left out: "empty caption", "image without captions".

    Raises:
        ValueError: no such file, another schema, an image id twice, a caption for an image that the file does not
            list, a split that the file does not have, or no captioned image at all.
    """
    path = Path(path)
    content = _read(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise ValueError(f"{path} has no list `images`; expected COCO's caption annotations or dataset_coco.json.")
    report = LoadReport()
    if "annotations" in content:
        if split is not None:
            raise ValueError(f"split is {split!r}, but {path} is COCO's file of one split; omit the split.")
        found = _official(content, path)
    else:
        found = _karpathy(images, path, split)
    twice = [image_id for image_id, count in Counter(image.image_id for image in found).items() if count > 1]
    if twice:
        raise ValueError(f"{path} lists image {twice[0]} twice{_others(twice)}; every image id must be there once.")
    kept = [one for image in found if (one := _captioned(image, report)) is not None]
    if not kept:
        raise ValueError(f"{path} holds no captioned image{f' of split {split!r}' if split else ''} ({report}).")
    return kept, report


def read_split(path: str | Path, split: str) -> tuple[list[CaptionedImage], LoadReport]:
    """One split: of Karpathy's file the images of that split, of COCO's all (its files hold one split each).

    Raises:
        ValueError: see `read_captions`.
    """
    content = _read(Path(path))
    official = isinstance(content, dict) and "annotations" in content
    return read_captions(path, None if official else split)


def _captioned(image: CaptionedImage, report: LoadReport) -> CaptionedImage | None:
    captions = tuple(text for caption in image.captions if (text := caption.strip()))
    report.add("empty caption", str(image.image_id), len(image.captions) - len(captions))
    if not captions:
        report.add("image without captions", str(image.image_id))
        return None
    return replace(image, captions=captions)


def _official(content: dict[str, Any], path: Path) -> list[CaptionedImage]:
    texts: dict[int, list[str]] = {}
    try:
        files = [(image["id"], image.get("file_name", "")) for image in content["images"]]
        for row in content["annotations"]:
            texts.setdefault(row["image_id"], []).append(_text(row["caption"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not COCO's caption format: an entry lacks or misuses {error}.") from error
    unknown = sorted(map(str, texts.keys() - {image_id for image_id, _ in files}))
    if unknown:
        raise ValueError(f"{path} has captions for image {unknown[0]}{_others(unknown)}, which it does not list.")
    return [CaptionedImage(image_id, file, tuple(texts.get(image_id, ()))) for image_id, file in files]


def _karpathy(images: list[dict[str, Any]], path: Path, split: str | None) -> list[CaptionedImage]:
    present = {image.get("split") for image in images}
    wanted = set(present) if split is None else set(KARPATHY_SPLITS.get(split, (split,)))
    if not wanted & present:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(sorted(map(str, present)))}.")
    try:
        return [
            CaptionedImage(
                image["cocoid"] if "cocoid" in image else image["imgid"],
                str(Path(image.get("filepath", ""), image["filename"])),
                tuple(_text(sentence["raw"]) for sentence in image["sentences"]),
            )
            for image in images
            if image.get("split") in wanted
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not Karpathy's caption format: an entry lacks or misuses {error}.") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a caption that is {type(value).__name__}")
    return value


def _others(names: Sequence[Any]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error


# --- result files ---------------------------------------------------------------------------------------------------


def read_results(path: str | Path) -> dict[int, str]:
    """Image id -> caption of a COCO result file.

    Raises:
        ValueError: no such file, another schema, an image id twice, or an empty caption.
    """
    path = Path(path)
    rows = _read(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} is not a list of results; expected [{{'image_id': 1, 'caption': 'a dog'}}, ...].")
    found: dict[int, str] = {}
    for row in rows:
        image_id, caption = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if not isinstance(image_id, int) or isinstance(image_id, bool) or not isinstance(caption, str):
            raise ValueError(f"{path}: result {str(row)[:80]}; expected an integer image_id and a caption.")
        if image_id in found:
            raise ValueError(f"{path} has image {image_id} twice; expected one caption per image.")
        found[image_id] = caption
    _check_said(found, str(path))
    return found


def write_results(captions: Mapping[int, str], path: str | Path) -> Path:
    """Write a COCO result file, sorted by image; returns the path.

    Raises:
        ValueError: an empty caption.
    """
    _check_said(captions, "captions")
    return write_json([{"image_id": i, "caption": captions[i]} for i in sorted(captions)], path, indent=None)


def _check_said(captions: Mapping[int, str], name: str) -> None:
    empty = [image_id for image_id, caption in captions.items() if not caption.strip()]
    if empty:
        raise ValueError(f"{name}: the caption of image {empty[0]}{_others(empty)} is empty; every image needs words.")


def pair_up(
    results: Mapping[int, str], images: Iterable[CaptionedImage], subset: bool = False
) -> tuple[dict[int, str], dict[int, tuple[str, ...]]]:
    """Captions and references by image, in the order of the images.

    Args:
        results: as read by `read_results`.
        images: the annotated ones.
        subset: skip annotated images without a result, instead of refusing.

    Raises:
        ValueError: results for unknown images; annotated images without a result.
    """
    references = {image.image_id: image.captions for image in images}
    unknown = [image_id for image_id in results if image_id not in references]
    if unknown:
        raise ValueError(
            f"the results caption image {unknown[0]}{_others(unknown)}, which the annotations do not have."
        )
    missing = [image_id for image_id in references if image_id not in results]
    if missing and not subset:
        raise ValueError(
            f"the results have no caption for image {missing[0]}{_others(missing)} of {len(references)}; COCO's scores "
            "need exactly one per image (or score the captioned images alone, with --subset)."
        )
    references = {image_id: texts for image_id, texts in references.items() if image_id in results}
    return {image_id: results[image_id] for image_id in references}, references


# --- images ---------------------------------------------------------------------------------------------------------


def find_images(
    images: Iterable[CaptionedImage], folder: str | Path, report: LoadReport, check: bool = True
) -> list[CaptionedImage]:
    """The images whose file is there, with its path.

    Args:
        images: their `file` is looked up below the folder, else its bare name.
        folder: of image files.
        report: counts "image missing" and "image not readable".
        check: decode every image now; else a broken one raises when it is read.

    Raises:
        ValueError: no such folder, or none of the images is usable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    found = []
    for image in images:
        path = next((p for p in (folder / image.file, folder / Path(image.file).name) if p.is_file()), None)
        if path is None:
            report.add("image missing", image.file or str(image.image_id))
        elif check and not readable(path):
            report.add("image not readable", str(path))
        else:
            found.append(replace(image, path=path))
    if not found:
        raise ValueError(f"{folder} holds no usable image of the annotations ({report}).")
    return found


def readable(path: Path) -> bool:
    """Whether an image decodes, to its last row."""
    try:
        read_image(path)
    except ValueError:
        return False
    return True


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 [H, W, 3].

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error
