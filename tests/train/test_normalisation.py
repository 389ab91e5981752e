"""One optimizer step gives the same loss and gradients however its samples are dealt to ranks and micro-batches."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from locations import ROOT
from narration_data import LLAMA, RecordGradients, TinyData
from ports import unused_port

import mmskip
from mmskip.models.video_llm.module import VideoLLM

METHOD = {"class_path": "mmskip.MoDConfig", "init_args": {"keep": 0.4, "gate": "sigmoid"}}


def fit(folder: Path, text: bool, **trainer) -> list[dict]:
    seed_everything(3)
    model = VideoLLM(LLAMA, methods=[mmskip.MoDConfig(keep=0.4, gate="sigmoid")], stream_weight=2.0)
    data = TinyData(batch_size=trainer.pop("batch_size"), shuffle=False, text=text)
    runner = Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[RecordGradients(str(folder / "gradients.pt"))],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    runner.fit(model, datamodule=data)
    return torch.load(folder / "gradients.pt", weights_only=True)


def validation(folder: Path) -> dict[str, float]:
    """The narration metrics in a run's log."""
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["val/lm_ppl"]]
    return {name: float(value) for name, value in rows[-1].items() if name.startswith("val/")}


def assert_same(steps: list[dict], expected: list[dict]) -> None:
    assert len(steps) == len(expected) > 1
    # the first steps only: Adam turns rounding of tiny gradients into differences of weights
    for step, other in zip(steps[:2], expected[:2], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["gradients"].keys() == other["gradients"].keys()
        for name, gradient in step["gradients"].items():
            torch.testing.assert_close(gradient, other["gradients"][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("text", [False, True])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, text):
    single = fit(tmp_path / "whole", text, batch_size=4)
    parts = fit(tmp_path / "parts", text, batch_size=1, accumulate_grad_batches=4)
    assert_same(parts, single)


def test_an_incomplete_last_step_is_normalised_by_its_own_labels(tmp_path):
    single = fit(tmp_path / "whole", False, batch_size=5)
    parts = fit(tmp_path / "parts", False, batch_size=1, accumulate_grad_batches=5)
    assert_same(parts, single)


def test_gradients_are_clipped_after_the_normalisation(tmp_path):
    free = fit(tmp_path / "free", False, batch_size=4)
    norm = torch.cat([gradient.flatten() for gradient in free[0]["gradients"].values()]).norm()
    clipped = fit(tmp_path / "clipped", False, batch_size=4, gradient_clip_val=float(norm) / 2)
    found = torch.cat([gradient.flatten() for gradient in clipped[0]["gradients"].values()]).norm()
    torch.testing.assert_close(found, norm / 2)


def test_two_ranks_of_train_py_equal_one(tmp_path):
    """Two processes under gloo; every batch of the second rank has text alone: no frame, and other label counts."""
    one = fit(tmp_path / "one", True, batch_size=2)
    config = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "callbacks": [
                {"class_path": "narration_data.RecordGradients", "init_args": {"path": "gradients.pt"}},
                {"class_path": "mmskip.train.reports.narration.NarrationReport", "init_args": {"pairs": 0}},
            ],
        },
        "model": {
            "class_path": "mmskip.models.video_llm.VideoLLM",
            "init_args": {"llm": LLAMA, "methods": [METHOD], "stream_weight": 2.0},
        },
        "data": {
            "class_path": "narration_data.TinyData",
            "init_args": {"batch_size": 1, "shuffle": False, "text": True},
        },
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    # what other tests of this process left of their own ranks would keep the second rank from being started
    left = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in left}
    environment = clean | {"PYTHONPATH": str(ROOT / "tests/support"), "OMP_NUM_THREADS": "1"}
    environment["MASTER_PORT"] = str(unused_port())
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--config", "two.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(torch.load(tmp_path / "gradients.pt", weights_only=True), one)
    # one folder for both ranks, and metrics over the samples of both (the second rank repeats one to fill up)
    (folder,) = (tmp_path / "runs/two").iterdir()
    alone, together = validation(tmp_path / "one"), validation(folder)
    assert together == pytest.approx(alone, rel=1e-3)
    assert done.stdout.count("Narration metrics on val") == 1
