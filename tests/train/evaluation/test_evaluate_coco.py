"""`evaluate.py coco` scores a result file and refuses what COCO's evaluation would score wrongly."""

import json
from pathlib import Path

import pytest

from mmskip.train.cli.evaluate import main

CAPTIONS = {1: ["A red dog runs.", "A dog runs fast."], 2: ["Two cats sleep."], 5: ["A bus, in the rain."]}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    annotations = {
        "images": [{"id": image, "file_name": f"{image}.jpg"} for image in CAPTIONS],
        "annotations": [{"image_id": i, "caption": text} for i, texts in CAPTIONS.items() for text in texts],
    }
    (tmp_path / "captions.json").write_text(json.dumps(annotations))
    results = [{"image_id": image, "caption": texts[0]} for image, texts in CAPTIONS.items()]
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path / "results.json", tmp_path / "captions.json"


def test_scores_are_printed_and_written(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    results, annotations = files
    assert main(["coco", "--results", str(results), "--annotations", str(annotations)]) == 0
    assert "Bleu_4    100.0" in capsys.readouterr().out
    report = json.loads(results.with_suffix(".scores.json").read_text())
    assert report["scores"]["ROUGE_L"] == pytest.approx(1) and report["images"] == 3
    assert report["scores"]["CIDEr"] == pytest.approx(sum(row["CIDEr"] for row in report["samples"]) / 3)


def test_a_subset_must_be_asked_for_and_can_be_weighed_by_all(files: tuple[Path, Path]) -> None:
    results, annotations = files
    arguments = ["coco", "--results", str(results), "--annotations", str(annotations)]
    assert main(arguments) == 0
    full = json.loads(results.with_suffix(".scores.json").read_text())
    results.write_text(json.dumps(json.loads(results.read_text())[:1]))
    assert main(arguments) == 2
    assert main([*arguments, "--subset", "--idf", str(annotations)]) == 0
    part = json.loads(results.with_suffix(".scores.json").read_text())
    assert part["images"] == 1 and part["samples"][0]["CIDEr"] == pytest.approx(full["samples"][0]["CIDEr"])


def test_what_is_wrong_is_one_line(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    results, annotations = files
    results.write_text(json.dumps([{"image_id": 1, "caption": "a"}] * 2))
    assert main(["coco", "--results", str(results), "--annotations", str(annotations)]) == 2
    assert "image 1 twice" in capsys.readouterr().err
    assert not results.with_suffix(".scores.json").exists()
