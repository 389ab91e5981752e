"""`train.py`: arguments, folders, resuming."""

import copy
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from locations import ROOT
from narration_data import LLAMA

from mmskip.train.checkpoints import WholeFileIO, last_checkpoint
from mmskip.train.cli import train as cli
from mmskip.train.cli.train import main, prepare_arguments
from mmskip.train.runs import SaveConfig

CONFIG = {
    "seed_everything": 3,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 3,
        "num_sanity_val_steps": -1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "mmskip.train.reports.narration.NarrationReport", "init_args": {"pairs": 2}}],
    },
    "model": {
        "class_path": "mmskip.models.video_llm.VideoLLM",
        "init_args": {
            "llm": LLAMA,
            "methods": [{"class_path": "mmskip.MoDConfig", "init_args": {"keep": 0.4}}],
            "max_new_tokens": 5,
        },
    },
    "data": {"class_path": "narration_data.TinyData", "init_args": {"shuffle": True}},
}


class Interrupt(Callback):
    """Ctrl-C in the middle of an epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 3):
            raise KeyboardInterrupt


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def losses(folder: Path) -> list[float]:
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [float(row["train/loss"]) for row in rows if row["train/loss"]]


def only(pattern: str, folder: Path) -> Path:
    (found,) = folder.glob(pattern)
    return found


# --- arguments ------------------------------------------------------------------------------------------------------


def test_without_subcommand_it_trains_and_bare_names_are_looked_up():
    arguments, name = prepare_arguments(["--config", "videollm_mod.yaml", "--trainer.max_epochs", "1"])
    assert arguments == ["fit", "--config", str(ROOT / "configs/videollm_mod.yaml"), "--trainer.max_epochs", "1"]
    assert name == "videollm_mod"
    arguments, name = prepare_arguments(["test", "--config=videollm_dense"])
    assert arguments == ["test", f"--config={ROOT / 'configs/videollm_dense.yaml'}"]
    assert name == "videollm_dense"


def test_the_saved_config_of_a_run_keeps_its_name(tmp_path):
    saved = tmp_path / "my_run" / "20260101-000000" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.touch()
    assert prepare_arguments(["--config", str(saved)])[1] == "my_run"


def test_an_unknown_config_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config", "videollm_mud.yaml"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "'videollm_mud.yaml'" in error
    assert "videollm_mod.yaml" in error


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_shows_the_commands_without_loading_torch(arguments):
    code = f"""
import runpy, sys
sys.argv = ["train.py", *{arguments}]
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "python train.py --config videollm_mod.yaml" in done.stdout
    assert "videollm_mod_ego4d.yaml" in done.stdout


@pytest.mark.parametrize(
    "argument",
    ["--model.hiden=1", "--trainer.max_epoch=1", "--data.batchsize=2", "--model.methods.kep=0.5", "--nme=x"],
)
def test_misspelt_keys_fail(here, argument, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config", "tiny.yaml", argument])
    assert stop.value.code == 2
    assert argument.partition("=")[0].rpartition(".")[2].lstrip("-") in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_misspelt_key_of_the_yaml_fails(here, capsys):
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_epoch": 2}}
    (here / "bad.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main(["--config", "bad.yaml"])
    assert stop.value.code == 2
    assert "max_epoch" in capsys.readouterr().err


def test_a_misspelt_setting_of_a_class_is_one_line_with_the_nearest_one(here, capsys):
    config = copy.deepcopy(CONFIG)
    config["model"]["init_args"]["methods"] = [{"class_path": "mmskip.MoDConfig", "init_args": {"kep": 0.5}}]
    (here / "bad.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["--config", "bad.yaml"])
    error = capsys.readouterr().err
    assert "mmskip.MoDConfig has no setting 'kep'. Did you mean 'keep'? It has: keep, layers," in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test"], "train first"),
        (["fit", "--ckpt_path", "last"], "train first"),
        (["fit", "--ckpt_path", "gone.ckpt"], "gone.ckpt.*is no file"),
        (["fit", "--name", "a/b"], "name is 'a/b'"),
        (["fit", "--model.methods.keep", "1.5"], "keep"),
    ],
)
def test_mistakes_are_one_clear_line_before_anything_is_written(here, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([arguments[0], "--config", "tiny.yaml", *arguments[1:]])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (here / "runs").exists()


def test_an_error_from_elsewhere_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr("mmskip.models.video_llm.module.loss_sums", lambda *args: json.loads("not ours"))
    with pytest.raises(json.JSONDecodeError):
        main(["--config", "tiny.yaml"])


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_one_folder_that_can_be_tested_predicted_and_run_again(here, capsys):
    main(["--config", "tiny.yaml"])
    folder = only("runs/tiny/*", here)
    names = {path.name for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name}
    pictures = {"keep_map.png", "quality_compute.png"}
    assert names >= {"config.yaml", "metrics.csv", "last.ckpt", "report.txt", "results.json", *pictures}
    assert any("tfevents" in path.name for path in folder.iterdir())
    printed = capsys.readouterr().out
    report = (folder / "report.txt").read_text()
    for text in ("untrained model", "majority baseline", "this model", "red circle enters", "x the speed"):
        assert text in report
        assert text in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["model"]["samples"] == 3
    assert results["metrics"]["untrained model"] != results["metrics"]["model"]
    assert results["savings"]["training_step"]["flops"] < results["savings"]["training_step"]["dense_flops"]

    main(["test", "--config", "tiny.yaml"])
    tested = json.loads((only("runs/tiny/*-test", here) / "results.json").read_text())
    # the tiny data tests on its validation samples
    assert tested["metrics"]["model"] == pytest.approx(results["metrics"]["model"])
    assert not list(here.glob("runs/tiny/*-test/config.yaml"))

    main(["validate", "--config", "tiny.yaml"])
    validated = json.loads((only("runs/tiny/*-validate", here) / "results.json").read_text())
    assert validated["metrics"] == results["metrics"]

    main(["predict", "--config", "tiny.yaml"])
    predictions = json.loads((only("runs/tiny/*-predict", here) / "predictions.json").read_text())["predictions"]
    assert [item["uid"] for item in predictions] == ["video-0", "video-1", "video-2"]
    assert set(predictions[0]["narrations"][0]) == {"time_s", "text"}

    main(["--config", str(folder / "config.yaml"), "--name", "again"])
    again = only("runs/again/*", here)
    assert losses(again) == losses(folder)
    assert (again / "config.yaml").read_text() == (folder / "config.yaml").read_text().replace("tiny", "again")


@pytest.mark.parametrize(("saving", "step"), [([], 4), (["--checkpoint.every_n_train_steps=2"], 6)])
def test_an_interrupted_run_resumes_with_the_loss_curve_of_a_whole_one(here, saving, step, capsys):
    """From the last epoch, or from the middle of one."""
    options = ["--model.lora.r=2", "--model.lora.dropout=0.3", "--model.lora.target_modules=all-linear", *saving]
    main(["--config", "tiny.yaml", "--name", "straight", *options])
    with pytest.raises(SystemExit):
        main(["--config", "tiny.yaml", "--name", "part", f"--trainer.callbacks+={__name__}.Interrupt", *options])
    assert "--ckpt_path last" in capsys.readouterr().out
    first = only("runs/part/*", here)
    assert torch.load(first / "checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    main(["--config", "tiny.yaml", "--name", "part", "--ckpt_path", "last", *options])
    (second,) = set((here / "runs/part").iterdir()) - {first}
    straight = losses(only("runs/straight/*", here))
    assert losses(first) == straight[: len(losses(first))]
    assert losses(second) == straight[step:]
    final, resumed = (
        torch.load(only(f"runs/{path}/checkpoints/last.ckpt", here), weights_only=True)["state_dict"]
        for path in ("straight/*", f"part/{second.name}")
    )
    for name, value in final.items():
        assert torch.equal(value, resumed[name])
    reports = [
        json.loads((only(f"runs/{run}", here) / "results.json").read_text())
        for run in ("straight/*", f"part/{second.name}")
    ]
    assert reports[0]["metrics"] == reports[1]["metrics"]
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert config["ckpt_path"] is None  # run again, it starts from the beginning


@pytest.mark.parametrize("ended", [KeyboardInterrupt(), SIGTERMException()])
def test_a_run_ended_by_its_user_or_scheduler_says_how_it_goes_on(tmp_path, capsys, ended):
    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True)
    callback = SaveConfig(None, None)
    callback.on_exception(trainer, None, ended)
    assert "nothing to resume from" in capsys.readouterr().out
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    callback.on_exception(trainer, None, ended)
    assert "--ckpt_path last" in capsys.readouterr().out


def test_a_checkpoint_of_another_method_is_refused(here, capsys):
    main(["--config", "tiny.yaml", "--trainer.max_epochs=1"])
    with pytest.raises(SystemExit) as stop:
        main(["test", "--config", "tiny.yaml", "--model.methods.keep=0.8"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "0.4" in error
    assert "0.8" in error


def test_a_save_that_fails_half_way_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    writer = WholeFileIO()
    writer.save_checkpoint({"step": 1}, path)

    def half(checkpoint, target):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint({"step": 2}, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert writer.load_checkpoint(path)["step"] == 1
    assert last_checkpoint(tmp_path) == path


def test_a_bare_name_is_found_in_the_folders_of_configs(tmp_path, monkeypatch):
    for place in ("flat.yaml", "video/deep.yaml", "video/twice.yaml", "pde/twice.yaml"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.setattr(cli, "CONFIGS", tmp_path)
    assert cli.find_config("flat") == tmp_path / "flat.yaml"
    assert cli.find_config("deep.yaml") == cli.find_config("video/deep") == tmp_path / "video/deep.yaml"
    assert cli.find_config("pde/twice.yaml") == tmp_path / "pde/twice.yaml"
    with pytest.raises(ValueError, match=r"2 configs 'twice' .*\(pde/twice.yaml, video/twice.yaml\); give the folder"):
        cli.find_config("twice")


def test_configs_folder_is_the_one_of_the_repository():
    assert ROOT / "configs" == cli.CONFIGS
