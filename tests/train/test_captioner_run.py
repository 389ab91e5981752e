"""A captioner's run by train.py: resumed as if never interrupted, normalised over micro-batches, tested, asked."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from captioning import SMALL, TEXTS, TOWER

from mmskip.datasets.captioning.snli_ve import LABELS
from mmskip.train.cli.train import main


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("captioner_run")
    content = {
        "seed_everything": 1,
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "num_sanity_val_steps": -1,
            "callbacks": [{"class_path": "mmskip.train.reports.captioning.CaptionReport"}],
        },
        "checkpoint": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
        "model": {
            "class_path": "mmskip.models.captioner.Captioner",
            "init_args": {"text": TEXTS["mbart"], **TOWER, "max_new_tokens": 5, "random_exits": 0.5},
        },
        "data": {
            "class_path": "mmskip.datasets.captioning.CaptionData",
            "init_args": {
                "root": str(root / "data"),
                "generated": asdict(SMALL) | {"steps": list(SMALL.steps), "claims": list(SMALL.claims)},
                "batch_size": 6,
            },
        },
    }
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fit(config: Path, name: str, *options: str) -> Path:
    runs = config.parent / "runs"
    main(["--config", str(config), "--runs_dir", str(runs), "--name", name, *options])
    return max((runs / name).iterdir(), key=lambda path: path.stat().st_mtime_ns)


def weights(run: Path, file: str = "4.ckpt") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / file, weights_only=True)["state_dict"]


def test_a_resumed_run_ends_where_the_whole_one_does(config, capsys):
    straight = fit(config, "straight")
    report = (straight / "report.txt").read_text()
    assert all(name in report for name in ("untrained model", "majority baseline", "this model", "truth"))
    resumed = fit(config, "resumed", f"--ckpt_path={straight / 'checkpoints' / '1.ckpt'}")
    one, two = weights(straight), weights(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, last = (json.loads((run / "results.json").read_text())["metrics"] for run in (straight, resumed))
    assert first == last


def test_training_starts_from_the_weights_of_another_run(config, capsys):
    first = fit(config, "first", "--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0")
    options = (
        "--trainer.num_sanity_val_steps=0",
        "--trainer.max_steps=1",
        "--model.lr=1e-12",
        "--model.weight_decay=0",
    )
    second = fit(config, "second", f"--start_from={first}", "--model.settle_weight=0.5", *options)
    one, two = weights(first, "last.ckpt"), weights(second, "last.ckpt")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    saved = yaml.safe_load((second / "config.yaml").read_text())
    assert saved["start_from"] == str((first / "checkpoints" / "last.ckpt").resolve())
    main(["validate", "--config", str(second / "config.yaml")])  # which starts from nothing
    other = torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)
    other["hyper_parameters"] = {"width": 3}
    torch.save(other, config.parent / "other.ckpt")
    for wrong, message in (
        (["--start_from=nowhere"], "nowhere: no such checkpoint"),
        ([f"--start_from={config}"], "not a checkpoint of a training run"),
        ([f"--start_from={first}", "--model.grid=2"], "was trained with grid="),
        ([f"--start_from={config.parent / 'other.ckpt'}"], "is of no Captioner: it has no setting 'text' but width"),
    ):
        with pytest.raises(SystemExit):
            fit(config, "third", *wrong, *options)
        assert message in capsys.readouterr().err
    assert not (first.parents[1] / "third").exists()


def test_micro_batches_give_the_step_of_the_whole_batch(config):
    plain = ["--model.random_exits=0", "--trainer.num_sanity_val_steps=0"]
    full = weights(fit(config, "one", *plain))
    split = weights(fit(config, "two", *plain, "--data.batch_size=3", "--trainer.accumulate_grad_batches=2"))
    assert all(torch.allclose(full[name], split[name], atol=2e-5) for name in full)


def test_a_run_is_tested_and_asked(config, capsys):
    fit(config, "asked", "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0")
    runs = ["--config", str(config), "--runs_dir", str(config.parent / "runs"), "--name", "asked"]
    main(["test", *runs])
    assert "Results on test" in capsys.readouterr().out
    main(["predict", *runs])
    (folder,) = (config.parent / "runs" / "asked").glob("*-predict")
    captions = json.loads((folder / "captions.json").read_text())
    assert [row["image_id"] for row in captions] == [2_000_000 + n for n in range(SMALL.test)]
    answers = json.loads((folder / "answers.json").read_text())
    assert len(answers) == SMALL.test * SMALL.pairs
    assert set(answers.values()) <= set(LABELS)


def test_another_tokenizer_is_refused(config, tmp_path, capsys):
    run = fit(config, "words", "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0")
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    with pytest.raises(SystemExit):
        main(
            ["test", "--config", str(config), "--runs_dir", str(tmp_path), f"--ckpt_path={checkpoint}",
             "--data.caption_prompt=tell me a wholly different thing"]
        )  # fmt: skip
    assert "tokens" in capsys.readouterr().err
