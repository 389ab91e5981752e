"""Every recipe in configs/ parses as it stands and runs, with its sizes made tiny."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from captioning import SMALL as CAPTIONS
from captioning import TEXTS, florence2
from chat_data import SMALL, TINY_VLM
from drawing import UNET_OPTIONS
from narration_data import LLAMA
from trained_runs import coin_set

from mmskip.datasets.synthetic.captions import generate_captions
from mmskip.datasets.synthetic.videos import GeneratedConfig, generate
from mmskip.train.cli.train import CONFIGS, main
from mmskip.train.runs import RunCLI

RECIPES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
TOWER = {"depth": 1, "patch_size": 32, "embed_dim": 12, "num_heads": 2}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    """Six generated videos with their narrations, in the format of Ego4D."""
    root = tmp_path_factory.mktemp("set")
    folder = root / f"embedded-{(config := GeneratedConfig(train=3, val=2, test=1)).id}"
    generate(folder, config)
    return root


def tiny(recipe: str, root: Path) -> list[str]:
    """Overrides that make a recipe small and independent of anything to download."""
    config = yaml.safe_load((CONFIGS / recipe).read_text())
    if config["model"]["class_path"].endswith("VLM"):
        return [
            f"--model.vlm={json.dumps(TINY_VLM)}",
            *(["--model.export=null"] if "export" in config["model"]["init_args"] else []),
            f"--data.root={root}",
            *(f"--data.generated.{name}={value}" for name, value in asdict(SMALL).items()),
            "--trainer.fast_dev_run=2",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    if config["model"]["class_path"].endswith("Captioner"):
        return captioner_options(config["data"]["init_args"], root)
    if config["model"]["class_path"].endswith("Classifier"):
        counts = ["--data.train_count=12", "--data.val_count=12", "--data.batch_size=4"]
        return [
            *counts,
            "--trainer.fast_dev_run=2",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    if config["model"]["class_path"].endswith("Diffusion"):
        return UNET_OPTIONS
    overrides = [
        f"--model.llm={json.dumps(LLAMA)}",
        "--model.max_new_tokens=4",
        f"--data.root={root}",
        "--trainer.fast_dev_run=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    if "annotations" in config["data"]["init_args"]:
        if config["data"]["class_path"].endswith("CoinData"):
            coin = coin_set(root / "coin")
            splits = dict.fromkeys(("train", "val", "test"), coin["annotations"])
            videos: Any = coin["videos"]
        else:
            (generated,) = root.glob("embedded-*")
            splits = {split: str(generated / split / "narrations.json") for split in ("train", "val")}
            videos = {split: str(generated / split / "videos") for split in ("train", "val")}
        return [
            *overrides,
            "--data.tower=timm/vit_tiny_patch16_224",
            "--data.image_size=96",
            f"--data.tower_kwargs={json.dumps(TOWER)}",
            "--data.tokenizer=null",
            "--data.num_workers=0",
            f"--data.annotations={json.dumps(splits)}",
            f"--data.video_dir={videos if isinstance(videos, str) else json.dumps(videos)}",
        ]
    return [*overrides, "--data.generated.train=3", "--data.generated.val=2", "--data.generated.test=1"]


def captioner_options(data: dict[str, Any], root: Path) -> list[str]:
    """Overrides of a captioner's recipe: a tiny model, and the embedded set in place of files to download."""
    options = [
        "--trainer.fast_dev_run=2",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false",
        "--model.max_new_tokens=4",
        f"--data.root={root}",
        "--data.batch_size=2",
        "--data.num_workers=0",
    ]
    if "generated" in data:
        small = {name: value for name, value in asdict(CAPTIONS).items() if name in ("train", "val", "test", "pairs")}
        text = TEXTS["mbart"] | {"d_model": 64}
        return [*options, f"--model.text={json.dumps(text)}", *(f"--data.generated.{k}={v}" for k, v in small.items())]
    folder = generate_captions(root / "captions", CAPTIONS, progress=False)
    named, name = ("captions", "captions.json") if "captions" in data else ("pairs", "pairs.jsonl")
    splits = ("train", "val", "test")
    files = {split: str(folder / split / name) for split in splits}
    images = {split: str(folder / split / "images") for split in splits}
    return [
        *options,
        f"--model.text={json.dumps(florence2())}",
        f"--data.{named}={json.dumps(files)}",
        f"--data.{named[:-1]}_images={json.dumps(images)}",
        "--data.tokenizer=null",
        "--data.image_size=48",
    ]


def test_there_are_recipes():
    assert {
        "videollm_mod.yaml",
        "videollm_dense.yaml",
        "videollm_mod_ego4d.yaml",
        "videollm_mod_1gpu.yaml",
        "videollm_coin.yaml",
    } <= set(RECIPES)
    assert {"mue.yaml", "mue_coco.yaml", "mue_snli_ve.yaml"} <= set(RECIPES)
    assert {"vlm_dense.yaml", "vlm_mod_lora.yaml", "vlm_router_only.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs(recipe, small_set, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    shutil.copytree(small_set, root)
    main(["--config", recipe, *tiny(recipe, root)])
    printed = capsys.readouterr().out
    expected = {"vlm": "answer acc.", "ski": "baseline: pixels' spread"}
    assert expected.get(recipe[:3], "majority baseline") in printed
    assert "this model" in printed


def test_the_embedded_recipe_trains_tests_predicts_and_draws_its_frames(small_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_set, tmp_path / "data")
    options = [option for option in tiny("videollm_mod.yaml", tmp_path / "data") if "fast_dev_run" not in option]
    main(["--config", "videollm_mod.yaml", *options, "--trainer.max_epochs=1", "--data.num_workers=1"])
    main(["test", "--config", "videollm_mod.yaml", *options])
    main(["predict", "--config", "videollm_mod.yaml", *options])
    trained, predicted, tested = sorted((tmp_path / "runs/videollm_mod").iterdir(), key=lambda path: path.name[15:])
    for folder in (trained, tested):
        assert {"dropped_patches.png", "keep_map.png", "results.json"} <= {path.name for path in folder.iterdir()}
    predictions = json.loads((predicted / "predictions.json").read_text())["predictions"]
    assert {item["uid"].split("#")[0] for item in predictions} == {"test-00000"}


def test_a_vlm_is_pretrained_tuned_tested_and_asked(tmp_path, monkeypatch, capsys):
    """The three recipes one after the other, as their comments say."""
    monkeypatch.chdir(tmp_path)
    options = [
        *(o for o in tiny("vlm_dense.yaml", tmp_path / "data") if not o.startswith(("--model", "--trainer.fast"))),
        "--trainer.max_epochs=1",
        "--data.batch_size=4",
    ]
    tuning = [*options, "--model.anneal_steps=2"]
    with pytest.raises(SystemExit) as stop:
        main(["--config", "vlm_mod_lora.yaml", *tuning])
    assert stop.value.code == 2
    assert "vlm_dense.yaml" in capsys.readouterr().err
    dense = ["--config", "vlm_dense.yaml", *options, f"--model.vlm={json.dumps(TINY_VLM)}"]
    main([*dense, "--trainer.max_steps=1", "--model.export=null"])
    assert "this model at step 0 of 1" in capsys.readouterr().out  # not as if it had been evaluated since
    main(dense)
    assert " at step" not in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "chat_template.jinja"} <= {
        p.name for p in Path("data/vlm_base").iterdir()
    }
    main(["--config", "vlm_router_only.yaml", *tuning])
    main(["--config", "vlm_mod_lora.yaml", *tuning, "--data.processor=null"])
    (folder,) = Path("runs/vlm_mod_lora").iterdir()
    assert {"mmskip", "lora"} == {path.name for path in (folder / "adapter").iterdir()}
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["before"]["keep"] == 1
    assert results["metrics"]["model"]["keep"] == 0.5
    assert results["savings"]["training_step"]["ideal_speedup"] > 1
    main(["test", "--config", "vlm_mod_lora.yaml", *tuning])
    main(["predict", "--config", "vlm_mod_lora.yaml", *tuning])
    (file,) = Path("runs/vlm_mod_lora").glob("*-predict/predictions.json")
    asked = json.loads(file.read_text())["predictions"]
    assert [item["id"] for item in asked] == ["test-00000", "test-00001"]
    assert all(item["truth"] for item in asked)


def settings(recipe: str) -> dict:
    return yaml.safe_load((CONFIGS / recipe).read_text())


def test_the_dense_twin_differs_in_its_methods_only():
    routed, dense = settings("videollm_mod.yaml"), settings("videollm_dense.yaml")
    assert routed["model"]["init_args"].pop("methods") != dense["model"]["init_args"].pop("methods") == []
    assert routed == dense


def test_the_papers_recipe_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunCLI, "_run_subcommand", lambda *args: pytest.fail("work started"))
    with pytest.raises(SystemExit) as stop:
        main(["--config", "videollm_mod_ego4d.yaml", f"--model.llm={json.dumps(LLAMA)}"])
    assert stop.value.code == 2
    assert "narration_train.json" in capsys.readouterr().err
