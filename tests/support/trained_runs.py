"""Tiny training runs on disk, for the tests of what uses a trained model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from narration_data import LLAMA

from mmskip.datasets.video.reader import write_video
from mmskip.train.cli.train import main

TOWER = {
    "tower": "timm/vit_tiny_patch16_224",
    "image_size": 32,
    "grid": 2,
    "tower_kwargs": {"depth": 1, "embed_dim": 32, "num_heads": 2},
}
WORDS = ["opens the door", "closes the door", "takes a cup", "looks around", "leaves"]


def narrated_set(folder: Path, videos: int, seed: int = 0, prefix: str = "v") -> dict[str, str]:
    """Videos of noise, 8 to 12 s long, with narrations in Ego4D's format; gives the file and the video folder."""
    rng = np.random.default_rng(seed)
    content = {}
    for number in range(videos):
        seconds = int(rng.integers(8, 13))
        frames = rng.integers(0, 255, (seconds * 2, 32, 32, 3), dtype=np.uint8)
        uid = f"{prefix}{number}"
        write_video(folder / "videos" / f"{uid}.mp4", frames, fps=2)
        times = np.sort(rng.choice(np.arange(1, 2 * seconds), 4, replace=False)) / 2
        texts = [f"#C C {WORDS[index]}" for index in rng.integers(len(WORDS), size=4)]
        records = [{"timestamp_sec": float(t), "narration_text": text} for t, text in zip(times, texts, strict=True)]
        content[uid] = {"narration_pass_1": {"narrations": records, "summaries": []}, "status": "complete"}
    path = folder / "narrations.json"
    path.write_text(json.dumps({"videos": content}))
    return {"annotations": str(path), "videos": str(folder / "videos")}


def train_run(
    folder: Path, data: dict[str, Any], methods: list[dict[str, Any]], epochs: int = 15, **model: Any
) -> Path:
    """Train a tiny model for a few epochs; gives the folder of the run."""
    config = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": epochs,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "logger": False,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "mmskip.models.video_llm.VideoLLM",
            "init_args": {"llm": LLAMA, "methods": methods, "max_new_tokens": 5, "lr": 0.01} | model,
        },
        "data": data,
        "runs_dir": str(folder / "runs"),
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["--config", str(path)])
    (run,) = (folder / "runs" / "tiny").iterdir()
    return run


def coin_set(folder: Path, videos: int = 4) -> dict[str, str]:
    """Videos in COIN's format whose steps are shown by the colour of the frames: half to train on, half to test on."""
    colours = {"paint it red": (255, 0, 0), "paint it green": (0, 255, 0), "paint it blue": (0, 0, 255)}
    database = {}
    for number in range(videos):
        order = [list(colours)[(number // 2 + step) % 3] for step in range(3)]
        frames = np.concatenate([np.full((6, 32, 32, 3), colours[name], np.uint8) for name in order])
        write_video(folder / "videos" / f"coin{number}.mp4", frames, fps=2)
        database[f"coin{number}"] = {
            "class": "PaintWall" if number // 2 % 2 else "PaintDoor",
            "recipe_type": 1,
            "subset": "testing" if number % 2 else "training",
            "start": 0.0,
            "end": 9.0,
            "duration": 9.0,
            "video_url": "",
            "annotation": [
                {"id": str(index), "segment": [3.0 * index, 3.0 * index + 2.5], "label": name}
                for index, name in enumerate(order)
            ],
        }
    path = folder / "COIN.json"
    path.write_text(json.dumps({"database": database}))
    return {"annotations": str(path), "videos": str(folder / "videos")}
