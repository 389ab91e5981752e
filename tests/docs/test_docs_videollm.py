"""docs/videollm.md: every command in it runs, with tiny things in the place of the large ones."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from locations import ROOT
from narration_data import LLAMA
from trained_runs import TOWER, WORDS, coin_set, narrated_set
from transformers import AutoConfig, AutoModelForCausalLM

from mmskip.datasets.narration.formats.coin import questions, read_coin
from mmskip.datasets.narration.index import read_annotations
from mmskip.datasets.narration.tokenizer import train_tokenizer
from mmskip.train.cli import encode
from mmskip.train.cli import evaluate as commands
from mmskip.train.cli import stream as stream_cli
from mmskip.train.cli import train as cli

PAGE = (ROOT / "docs" / "videollm.md").read_text()
LLM, BIG_TOWER = "Qwen/Qwen2.5-7B-Instruct", "open_clip/ViT-L-16-SigLIP-384/webli"
PROGRAMS: dict[str, Callable[[list[str]], int | None]] = {
    "mmskip train": cli.main,
    "mmskip evaluate": commands.main,
    "mmskip stream": stream_cli.main,
    "mmskip encode": encode.main,
}
KWARGS = json.dumps({**TOWER["tower_kwargs"], "patch_size": 8})  # a grid of 3 needs more than 2 x 2 patches
# what makes a command tiny, by program; nothing of the page's own arguments is dropped
TINY = {
    "mmskip train": [
        *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_epochs=1"),
        *("--trainer.enable_progress_bar=false", "--trainer.accumulate_grad_batches=1", "--data.num_workers=0"),
        *("--data.tower=" + TOWER["tower"], "--data.image_size=32", f"--data.tower_kwargs={KWARGS}"),
        *("--model.llm_dtype=float32", "--model.lora.r=2", "--model.max_new_tokens=4"),
    ],
    "mmskip evaluate": ["--device", "cpu"],
    "mmskip stream": ["--device", "cpu", "--max_new_tokens", "4"],
    "mmskip encode": ["--device", "cpu", "--image-size", "32", "--tower-kwargs", KWARGS],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def page_commands() -> list[str]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with everything the page assumes."""
    folder = tmp_path_factory.mktemp("docs")
    own = narrated_set(folder / "data" / "own", 2)
    content = json.loads(Path(own["annotations"]).read_text())["videos"]
    for old, new in zip(sorted(content), ("kitchen-01", "kitchen-02"), strict=True):
        content[new] = content.pop(old)
        (Path(own["videos"]) / f"{old}.mp4").rename(Path(own["videos"]) / f"{new}.mp4")
    for split in ("train", "val", "test"):
        (folder / "data" / "own" / f"{split}.json").write_text(json.dumps({"videos": content}))
    coin_set(folder / "data" / "coin")
    videos, _ = read_coin(folder / "data" / "coin" / "COIN.json")
    asked = [text for video in videos for item in questions(video) for text in (item.question, item.text)]
    shown = ["Narrate what happens in the video while it happens . what is moving ?", *WORDS]
    tokenizer = train_tokenizer([*shown, *asked])
    tokenizer.save_pretrained(folder / "tiny-llm")
    settings = {key: value for key, value in LLAMA.items() if key != "model_type"}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **settings, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "tiny-llm")
    return folder


def test_the_page_shows_each_program():
    shown = {name for name in PROGRAMS for command in page_commands() if command.startswith(name)}
    assert shown == set(PROGRAMS)
    assert all(any(command.startswith(name) for name in PROGRAMS) for command in page_commands())


def test_every_command_of_the_page_runs_in_its_order(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for command in page_commands():
        program = next(name for name in PROGRAMS if command.startswith(name))
        small = command.replace(LLM, "tiny-llm").replace(BIG_TOWER, TOWER["tower"])
        extra = TINY[program] + (["--pairs", "2"] if "--keep" in command else [])
        arguments = shlex.split(small.removeprefix(program)) + extra
        status = PROGRAMS[program](arguments)
        assert not status, f"{command}\n{capsys.readouterr().err}"
    made = {path.name for path in (place / "runs").iterdir()}
    assert made == {"videollm_mod_1gpu", "videollm_dense_1gpu", "videollm_coin"}
    assert json.loads((place / "results" / "val" / "results.json").read_text())["results"]["trained"]["samples"] == 2
    newest = max((place / "runs" / "videollm_mod_1gpu").glob("2*/"), key=lambda path: path.stat().st_mtime)
    assert (newest / "evaluation" / "ego4d" / "quality_compute.png").is_file()
    assert list((place / "data" / "features").glob("*/shard-00000.safetensors"))
    assert list(newest.rglob("report.html")), "the stream's report"


def test_the_example_of_the_format_is_readable(tmp_path):
    (example,) = blocks("json")
    (tmp_path / "own.json").write_text(example)
    entries, report = read_annotations(tmp_path / "own.json")
    assert [(entry.uid, len(entry.moments)) for entry in entries] == [("kitchen-01", 2)] and not report.counts
