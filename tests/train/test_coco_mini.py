"""The 99 real COCO images with captions run through training, captioning and scoring."""

import json

import pytest
from captioning import TEXTS, TOWER
from locations import SHARED_DATA

from mmskip.train.cli.evaluate import main
from mmskip.train.cli.train import main as train

COCO = SHARED_DATA / "coco" / "mini"
pytestmark = pytest.mark.skipif(not COCO.is_dir(), reason="the real images (../shared/data/coco/mini) are not here")


def test_real_images_are_trained_on_captioned_and_scored(tmp_path):
    files = {split: str(COCO / f"captions_{split}2017.json") for split in ("train", "val")}
    images = {split: str(COCO / f"{split}2017") for split in ("train", "val")}
    config = {
        "seed_everything": 1,
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0},
        "model": {
            "class_path": "mmskip.models.captioner.Captioner",
            "init_args": {"text": TEXTS["bart"], **TOWER, "lr": 1e-2, "max_new_tokens": 12, "num_beams": 2},
        },
        "data": {
            "class_path": "mmskip.datasets.captioning.CaptionData",
            "init_args": {"captions": files, "caption_images": images, "image_size": 48, "batch_size": 10},
        },
    }
    path = tmp_path / "mini.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    train(["--config", str(path), "--runs_dir", str(tmp_path / "runs")])
    sweep = ["--split", "val", "--decoder", "0.9", "--timed", "0", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["coco", "--checkpoint", str(tmp_path / "runs" / "mini"), *sweep]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["images"], results["left_out"]) == (49, {})
    assert results["results"]["full"]["metrics"]["Bleu_1"] > 0
    said = json.loads((tmp_path / "out" / "decoder-0.9" / "captions.json").read_text())
    assert len(said) == 49 and all(row["caption"] for row in said)
    own = ["--results", str(tmp_path / "out" / "full" / "captions.json"), "--annotations", files["val"]]
    assert main(["coco", *own]) == 0
