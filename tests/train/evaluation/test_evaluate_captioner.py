"""`evaluate.py coco --checkpoint` and `snli_ve`: sweeps of exits on a trained captioner, resumed, refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from captioning import SMALL, TEXTS, TOWER

from mmskip.train.cli.evaluate import main
from mmskip.train.cli.train import main as train
from mmskip.train.evaluation.captioner.exit_sweep import add_exit_arguments, plan
from mmskip.train.evaluation.captioner.generation import said_length
from mmskip.train.load_run import find_run, load_captioner
from mmskip.utils.command import CommandParser


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps, with its embedded set."""
    root = tmp_path_factory.mktemp("captioner")
    config = {
        "seed_everything": 1,
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0},
        "model": {
            "class_path": "mmskip.models.captioner.Captioner",
            "init_args": {"text": TEXTS["mbart"], **TOWER, "max_new_tokens": 5},
        },
        "data": {
            "class_path": "mmskip.datasets.captioning.CaptionData",
            "init_args": {
                "root": str(root / "data"),
                "generated": asdict(SMALL) | {"steps": list(SMALL.steps), "claims": list(SMALL.claims)},
            },
        },
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    train(["--config", str(root / "tiny.yaml"), "--runs_dir", str(root / "runs")])
    return root / "runs" / "tiny"


def evaluated(command: str, run: Path, out: Path, *options: str) -> int:
    return main([command, "--checkpoint", str(run), "--out", str(out), "--device", "cpu", *options])


def test_captions_are_scored_written_and_swept(run, tmp_path, capsys):
    sweep = ["--encoder", "-1", "--decoder", "1", "--blank", "--timed", "1", "--pairs-timed", "2"]
    assert evaluated("coco", run, tmp_path, *sweep) == 0
    printed = capsys.readouterr().out
    assert "CIDEr" in printed and "encoder--1.0_decoder-1.0" in printed
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert set(results) == {"full", "encoder--1.0_decoder-1.0", "blanked"}
    left = results["encoder--1.0_decoder-1.0"]
    assert left["exits"]["mean"] == {"image": 1, "prompt": 1, "decoder": 3}
    assert sum(left["exits"]["histogram"]["image"]["right"]) + sum(left["exits"]["histogram"]["image"]["wrong"]) == 4
    assert 0 < left["exits"]["layers_left_out"] < 1
    assert left["compute"]["counted"] < 1 == results["full"]["compute"]["counted"]
    assert results["full"]["exits"]["layers_left_out"] == 0
    captions = json.loads((tmp_path / "full" / "captions.json").read_text())
    assert [row["image_id"] for row in captions] == [2_000_000 + n for n in range(4)]
    # the result file says what the evaluation of a file says
    annotations = next((run.parents[1] / "data").glob("captions-*")) / "test" / "captions.json"
    file = tmp_path / "full" / "captions.json"
    assert main(["coco", "--results", str(file), "--annotations", str(annotations)]) == 0
    scores = json.loads(file.with_suffix(".scores.json").read_text())["scores"]
    assert scores == pytest.approx({name: results["full"]["metrics"][name] for name in scores})


def test_pairs_are_judged_alike_alone_and_in_batches(run, tmp_path):
    sweep = ["--encoder", "0.5", "--decoder", "0.5", "--timed", "0"]
    assert evaluated("snli_ve", run, tmp_path / "one", *sweep, "--batch-size", "1") == 0
    assert evaluated("snli_ve", run, tmp_path / "four", *sweep, "--batch-size", "4") == 0
    one, four = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("one", "four"))
    assert one == four
    full = one["full"]
    assert full["metrics"]["pairs"] == 4 * SMALL.pairs
    right = sum(full["exits"]["histogram"]["decoder"]["right"])
    assert right / full["metrics"]["pairs"] == pytest.approx(full["metrics"]["accuracy"])


def test_an_interrupted_sweep_goes_on(run, tmp_path, monkeypatch):
    assert evaluated("snli_ve", run, tmp_path, "--timed", "0") == 0
    complete = (tmp_path / "full" / "samples.jsonl").read_text()
    (tmp_path / "full" / "samples.jsonl").write_text("\n".join(complete.splitlines()[:2]) + "\n")
    seen: list[int] = []
    from mmskip.train.evaluation.captioner.task import CaptionTask

    batch = CaptionTask.batch
    monkeypatch.setattr(CaptionTask, "batch", lambda self, data, n: seen.extend(n) or batch(self, data, n))
    assert evaluated("snli_ve", run, tmp_path, "--timed", "0") == 0
    assert len(seen) == 2
    assert (tmp_path / "full" / "samples.jsonl").read_text() == complete


def test_files_of_ones_own_are_evaluated(run, tmp_path, capsys):
    folder = next((run.parents[1] / "data").glob("captions-*")) / "val"
    given = ["--images", str(folder / "images"), "--timed", "0"]
    assert evaluated("snli_ve", run, tmp_path / "a", "--annotations", str(folder / "pairs.jsonl"), *given) == 0
    assert evaluated("coco", run, tmp_path / "b", "--annotations", str(folder / "captions.json"), *given) == 0
    content = json.loads((folder / "captions.json").read_text())
    for name, changed in {
        "twice": {**content, "images": content["images"] + content["images"][:1]},
        "unknown": {**content, "images": content["images"][1:]},
    }.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(changed))
        assert evaluated("coco", run, tmp_path / name, "--annotations", str(path), *given) == 2
        assert ("1000000 twice" if name == "twice" else "does not list") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("coco", ["--encoder", "1.5"], "--encoder: threshold is 1.5"),
        ("coco", ["--beams", "0"], "--beams is 0"),
        ("coco", ["--results", "x.json"], "either --results"),
        ("coco", ["--annotations", "x.json"], "belong together"),
        ("snli_ve", ["--decoder", "0.9", "--min-layers", "3"], "leaves no exit"),
        ("snli_ve", ["--split", "dev"], "no pairs for split 'dev'"),
        ("snli_ve", ["--pairs-timed", "1"], "--pairs_timed 1"),
        ("coco", ["--encoder", "0.9", "--max-layers", "2"], "--max_layers is 2, which needs thresholds of the decoder"),
    ],
)
def test_bad_arguments_are_one_line(run, tmp_path, capsys, command, options, message):
    assert evaluated(command, run, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_settings_the_model_cannot_have_are_refused_before_anything_is_computed(run, tmp_path, capsys):
    assert evaluated("snli_ve", run, tmp_path / "out", "--decoder", "0.9", "--max-layers", "99") == 2
    assert "max_layers is 99, and there are" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.json*"))


def test_another_kind_of_run_is_refused(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(next(run.iterdir()), copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"]["class_path"] = "mmskip.models.video_llm.VideoLLM"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert evaluated("snli_ve", copy, tmp_path / "out") == 2
    assert "holds no captioner" in capsys.readouterr().err


def test_a_checkpoint_from_before_a_setting_takes_its_default(run):
    found = find_run(run)
    checkpoint = torch.load(found.checkpoint, weights_only=True)
    del checkpoint["hyper_parameters"]["settle_weight"], checkpoint["hyper_parameters"]["random_token_exits"]
    older = found.checkpoint.with_name("older.ckpt")
    torch.save(checkpoint, older)
    model = load_captioner(find_run(older))
    assert model.hparams["settle_weight"] == 0
    assert model.hparams["layer_loss"] == checkpoint["hyper_parameters"]["layer_loss"]
    older.unlink()


def test_a_caption_ends_at_its_eos():
    assert said_length([5, 6, 2, 0, 0], 2) == 3
    assert said_length([5, 6], 2) == 2


def test_settings_share_no_folder_and_no_checkpoint_brings_learned_heads(capsys):
    parser = CommandParser()
    add_exit_arguments(parser)
    names = []
    for given in (
        [],
        ["--kv", "copy"],
        ["--decay", "0.5"],
        ["--min-layers", "2"],
        ["--criterion", "margin"],
        ["--max-layers", "9"],
    ):
        options = parser.parse_args(["--decoder", "0.9999995", "0.9999996", *given])
        names += [variant.name for variant in plan(options)[1:]]
    assert len(set(names)) == 12 and "decoder-0.9999995_kv-copy" in names
    with pytest.raises(SystemExit):
        parser.parse_args(["--criterion", "learned"])
    assert "invalid choice" in capsys.readouterr().err
