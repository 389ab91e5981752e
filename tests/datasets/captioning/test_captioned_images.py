"""COCO captions and SNLI-VE: what is read, what is counted, and which files are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from locations import SHARED_DATA as SHARED
from PIL import Image

from mmskip.datasets.captioning.batch import PictureDataset, PictureEntry
from mmskip.datasets.captioning.coco import (
    find_images,
    pair_up,
    read_captions,
    read_results,
    write_results,
)
from mmskip.datasets.captioning.snli_ve import LABELS, find_pair_images, read_pairs
from mmskip.datasets.common.report import LoadReport

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the tree")


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def _official(**changes: Any) -> dict[str, Any]:
    content = {
        "images": [{"id": 3, "file_name": "3.jpg"}, {"id": 1, "file_name": "1.jpg"}, {"id": 9, "file_name": "9.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "A dog. "},
            {"image_id": 3, "caption": "A cat."},
            {"image_id": 1, "caption": "One dog."},
            {"image_id": 3, "caption": "  "},
        ],
    }
    return content | changes


def test_official_annotations_keep_the_order_of_images_and_count_what_is_empty(tmp_path: Path) -> None:
    images, report = read_captions(_write(tmp_path / "c.json", _official()))
    assert [(image.image_id, image.captions) for image in images] == [(3, ("A cat.",)), (1, ("A dog.", "One dog."))]
    assert report.counts == {"empty caption": 1, "image without captions": 1}


def test_karpathys_file_gives_its_splits_and_train_holds_restval(tmp_path: Path) -> None:
    rows = [
        {"cocoid": i, "imgid": i + 100, "split": split, "filepath": "val2014", "filename": f"{i}.jpg",
         "sentences": [{"raw": f"Image {i}.", "sentid": i}]}
        for i, split in enumerate(("train", "restval", "val", "test"))
    ]  # fmt: skip
    path = _write(tmp_path / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    found = {split: [i.image_id for i in read_captions(path, split)[0]] for split in ("train", "val", "test", None)}
    assert found == {"train": [0, 1], "val": [2], "test": [3], None: [0, 1, 2, 3]}
    assert read_captions(path, "test")[0][0].file == "val2014/3.jpg"
    with pytest.raises(ValueError, match="no split 'dev'; it has restval, test, train, val"):
        read_captions(path, "dev")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (_official(images=[{"id": 1}, {"id": 3}, {"id": 1}]), "lists image 1 twice"),
        (_official(images=[{"id": 1}]), "captions for image 3, which it does not list"),
        (_official(annotations=[{"image_id": 1}]), "lacks or misuses 'caption'"),
        (_official(annotations=[{"image_id": 1, "caption": 5}]), "a caption that is int"),
        (_official(annotations=[]), "no captioned image"),
        ([], "no list `images`"),
        ("{", "not a readable JSON file"),
    ],
)
def test_bad_annotations_are_refused(tmp_path: Path, content: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_captions(_write(tmp_path / "c.json", content))


def test_results_go_out_and_come_back(tmp_path: Path) -> None:
    path = write_results({3: "a cat", 1: "a dog"}, tmp_path / "r.json")
    assert json.loads(path.read_text()) == [{"image_id": 1, "caption": "a dog"}, {"image_id": 3, "caption": "a cat"}]
    images, _ = read_captions(_write(tmp_path / "c.json", _official()))
    captions, references = pair_up(read_results(path), images)
    assert list(captions.items()) == [(3, "a cat"), (1, "a dog")] and list(references) == [3, 1]
    with pytest.raises(ValueError, match="caption of image 1 is empty"):
        write_results({1: " "}, tmp_path / "r.json")


@pytest.mark.parametrize(
    ("results", "match"),
    [
        ([{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}], "image 1 twice"),
        ([{"image_id": 1, "caption": ""}, {"image_id": 3, "caption": "b"}], "caption of image 1 is empty"),
        ([{"image_id": "1", "caption": "a"}], "an integer image_id"),
        ([{"image_id": 1}], "an integer image_id and a caption"),
        ({}, "not a list of results"),
        ([{"image_id": 7, "caption": "a"}], "image 7, which the annotations do not have"),
        ([{"image_id": 1, "caption": "a"}], "no caption for image 3 of 2"),
    ],
)
def test_bad_results_are_refused(tmp_path: Path, results: Any, match: str) -> None:
    images, _ = read_captions(_write(tmp_path / "c.json", _official()))
    with pytest.raises(ValueError, match=match):
        pair_up(read_results(_write(tmp_path / "r.json", results)), images)


def _picture(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((40, 30, 3), 128, np.uint8)).save(path)
    return path


def test_missing_and_truncated_images_are_counted(tmp_path: Path) -> None:
    content = _picture(tmp_path / "images" / "1.jpg").read_bytes()
    (tmp_path / "images" / "3.jpg").write_bytes(content[: len(content) // 2])
    images, _ = read_captions(_write(tmp_path / "c.json", _official(
        annotations=[{"image_id": i, "caption": "x"} for i in (1, 3, 9)])))  # fmt: skip
    report = LoadReport()
    found = find_images(images, tmp_path / "images", report)
    assert [image.image_id for image in found] == [1]
    assert report.counts == {"image missing": 1, "image not readable": 1}
    entries = [PictureEntry(str(image.image_id), image.path, image.captions) for image in found]
    _, pixels = PictureDataset(entries, 16)[0]
    assert pixels.shape == (3, 16, 16) and pixels.mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(PictureDataset(entries, 16, blank=True)[0][1], torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="holds no usable image"):
        find_images(images[:1], tmp_path / "images", LoadReport())


def _pair(**changes: Any) -> dict[str, Any]:
    row = {"Flikr30kID": "12", "sentence1": "A man.", "sentence2": "A dog.", "gold_label": "neutral", "pairID": "12#1"}
    return {key: value for key, value in (row | changes).items() if value is not None}


def test_snli_ve_takes_both_image_keys_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    rows = [
        _pair(),
        _pair(Flikr30kID=None, Flickr30K_ID="13", pairID="13#1", gold_label="entailment"),
        _pair(pairID="14#1", gold_label="-"),
        _pair(pairID="15#1", sentence2=" "),
    ]
    pairs, report = read_pairs(_write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert [(p.uid, p.file, p.label) for p in pairs] == [
        ("12#1", "12.jpg", "neutral"),
        ("13#1", "13.jpg", "entailment"),
    ]
    assert report.counts == {"no gold label": 1, "empty hypothesis": 1}
    _picture(tmp_path / "images" / "13.jpg")
    assert [pair.uid for pair in find_pair_images(pairs, tmp_path / "images", report)] == ["13#1"]
    assert report.counts["image missing"] == 1


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([_pair(), _pair()], "line 2: pair 12#1 is there twice"),
        ([_pair(gold_label="maybe")], "line 1: label 'maybe'; expected entailment"),
        ([_pair(Flikr30kID=None)], "has no image; expected one of the keys Flickr30K_ID, Flikr30kID"),
        (["x"], "expected a JSON object"),
        ([], "no usable pair"),
    ],
)
def test_bad_pairs_are_refused(tmp_path: Path, rows: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_pairs(_write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))


@needs_data
def test_real_coco_images_and_entailment_pairs_are_read() -> None:
    mini = SHARED / "coco" / "mini"
    count = 0
    for split in ("train2017", "val2017"):
        images, report = read_captions(mini / f"captions_{split}.json")
        found = find_images(images, mini / split, report, check=False)
        count += len(found)
        assert not report.counts
    assert count == 99
    assert PictureDataset([PictureEntry("", found[0].path)], 64, resize=64)[0][1].shape == (3, 64, 64)
    pairs, report = read_pairs(SHARED / "snli_ve" / "esnlive_dev.jsonl")
    assert len(pairs) + sum(report.counts.values()) == 9608 and {pair.label for pair in pairs} == set(LABELS)
