"""`evaluate.py ego4d`: the numbers of every batch size and rank, resuming, bad files, sweeps of the budget."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from locations import ROOT
from ports import unused_port
from torch.multiprocessing import start_processes
from trained_runs import TOWER, narrated_set, train_run

import mmskip
from mmskip.train.cli.evaluate import main
from mmskip.train.evaluation.video_llm import task as common
from mmskip.train.evaluation.video_llm.compute_sweep import Budgets, plan_variants
from mmskip.train.load_run import find_run, load_data, load_model

METRICS = ("lm_ppl", "lm_correctness", "time_diff", "fluency", "samples", "turns")
MOD = [{"class_path": "mmskip.MoDConfig", "init_args": {"keep": 0.4, "gate": "sigmoid"}}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on three videos, tested on four."""
    folder = tmp_path_factory.mktemp("trained")
    train, test = narrated_set(folder / "train", 3), narrated_set(folder / "test", 4, seed=1, prefix="t")
    data = {
        "class_path": "mmskip.datasets.narration.NarrationData",
        "init_args": {
            "root": str(folder / "data"),
            "annotations": {"train": train["annotations"], "val": train["annotations"], "test": test["annotations"]},
            "video_dir": {"train": train["videos"], "val": train["videos"], "test": test["videos"]},
            "batch_size": 2,
            **TOWER,
        },
    }
    return train_run(folder, data, MOD)


def evaluate(run: Path, out: Path, *options: str) -> dict:
    assert main(["ego4d", "--checkpoint", str(run), "--out", str(out), "--device", "cpu", *options]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory) -> tuple[Path, dict]:
    """The evaluation one by one: the reference."""
    out = tmp_path_factory.mktemp("alone")
    return out, evaluate(trained, out, "--batch-size", "1")


def samples(out: Path, variant: str = "trained") -> dict[str, dict]:
    return {sample["uid"]: sample for sample in json.loads((out / variant / "results.json").read_text())["samples"]}


def same(left: Path, right: Path) -> None:
    left_samples, right_samples = samples(left), samples(right)
    assert left_samples.keys() == right_samples.keys() and left_samples
    for uid, sample in left_samples.items():
        other = right_samples[uid]
        assert {key: sample[key] for key in METRICS} == pytest.approx({key: other[key] for key in METRICS}, rel=1e-5)
        for turn, twin in zip(sample["told"], other["told"], strict=True):
            for key in ("correct", "text_tokens", "stream_tokens", "frame_diff", "narration", "time_s"):
                assert turn[key] == twin[key]


def test_numbers_are_those_of_lightnings_test(trained, alone, tmp_path):
    model, data = load_model(find_run(trained)), load_data(find_run(trained))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet).test(model, datamodule=data, verbose=False)
    assert alone[1]["results"]["trained"] == pytest.approx(model.results, rel=1e-5)
    assert 0 < model.results["fluency"] < 1 < model.results["lm_ppl"] and model.results["lm_correctness"] > 0


def test_results_hold_samples_and_totals(alone):
    out, results = alone
    total = results["results"]["trained"]
    assert (total["samples"], results["split"]) == (4, "test")
    assert set(samples(out)) == {"t0", "t1", "t2", "t3"}
    for key in METRICS[:4]:
        assert total[key] == pytest.approx(sum(sample[key] for sample in samples(out).values()) / 4)
    turn = samples(out)["t0"]["told"][0]
    assert set(turn) >= {"time_s", "narration", "nll", "correct", "frame_diff"} and turn["narration"].startswith("C ")


def test_batches_of_eight_give_the_same_numbers(trained, alone, tmp_path):
    evaluate(trained, tmp_path, "--batch-size", "8")
    same(alone[0], tmp_path)


def run_rank(rank: int, arguments: list[str], port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert main(arguments) == 0


def test_two_ranks_give_the_same_numbers(trained, alone, tmp_path, capfd):
    arguments = ["ego4d", "--checkpoint", str(trained), "--out", str(tmp_path), "--device", "cpu", "--batch-size", "1"]
    start_processes(run_rank, (arguments, unused_port()), nprocs=2, start_method="spawn")
    assert capfd.readouterr().out.count("LM-PPL") == 1, "one rank prints"
    same(alone[0], tmp_path)
    assert not list(tmp_path.glob("*/samples-*.jsonl"))


@pytest.mark.slow
def test_torchrun_starts_it(trained, alone, tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "evaluate.py"), "ego4d"),
        *("--checkpoint", str(trained), "--out", str(tmp_path), "--device", "cpu", "--batch-size", "1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    same(alone[0], tmp_path)


def test_an_interrupted_evaluation_goes_on(trained, alone, tmp_path, monkeypatch):
    from mmskip.train.evaluation.video_llm import ego4d

    real, seen = ego4d.score_turns, []

    def stopping(model, batch):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(batch["uid"])
        return real(model, batch)

    monkeypatch.setattr(ego4d, "score_turns", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(trained, tmp_path, "--batch-size", "1")
    with (tmp_path / "trained" / "samples-0.jsonl").open("a") as file:
        file.write('{"uid": "t2", "tur')  # cut off in the middle of a line
    again = []
    monkeypatch.setattr(ego4d, "score_turns", lambda model, batch: again.extend(batch["uid"]) or real(model, batch))
    evaluate(trained, tmp_path, "--batch-size", "1")
    assert seen == ["t0", "t1"] and again == ["t2", "t3"]
    same(alone[0], tmp_path)
    evaluate(trained, tmp_path)
    assert again == ["t2", "t3"], "a finished evaluation computes nothing"


def test_results_of_another_configuration_are_refused(trained, tmp_path, capsys):
    evaluate(trained, tmp_path)
    options = ["--checkpoint", str(trained), "--out", str(tmp_path), "--device", "cpu"]
    assert main(["ego4d", *options, "--split", "val"]) == 2
    error = capsys.readouterr().err
    assert "holds another evaluation" in error and "split: 'test' there, 'val' now" in error


def test_only_samples_that_changed_are_computed_again(trained, tmp_path, monkeypatch):
    """A repaired or replaced video, a mended narration, a new video: the results of all others stay."""
    from mmskip.train.evaluation.video_llm import ego4d

    real, seen = ego4d.score_turns, []
    monkeypatch.setattr(ego4d, "score_turns", lambda model, batch: seen.extend(batch["uid"]) or real(model, batch))
    other = narrated_set(tmp_path / "other", 3, seed=5, prefix="o")
    path, videos = Path(other["annotations"]), Path(other["videos"])
    complete = json.loads(path.read_text())
    path.write_text(json.dumps({"videos": {uid: complete["videos"][uid] for uid in ("o0", "o1")}}))
    options = ["--annotations", str(path), "--videos", str(videos)]
    before = evaluate(trained, tmp_path / "out", *options)["results"]["trained"]
    assert seen == ["o0", "o1"]
    seen.clear()
    shutil.copy(videos / "o2.mp4", videos / "o0.mp4")
    path.write_text(json.dumps(complete))
    after = evaluate(trained, tmp_path / "out", *options)["results"]["trained"]
    assert sorted(seen) == ["o0", "o2"]
    assert (before["samples"], after["samples"]) == (2, 3)
    fresh = evaluate(trained, tmp_path / "fresh", *options)["results"]["trained"]
    assert after == pytest.approx(fresh, rel=1e-5)


def test_one_bad_file_does_not_end_an_evaluation(trained, tmp_path, capsys):
    other = narrated_set(tmp_path / "other", 3, seed=5, prefix="o")
    content = json.loads(Path(other["annotations"]).read_text())
    content["videos"]["unknown"] = content["videos"]["o0"]
    Path(other["annotations"]).write_text(json.dumps(content))
    full = ["--annotations", other["annotations"], "--videos", other["videos"]]
    assert evaluate(trained, tmp_path / "whole", *full)["results"]["trained"]["samples"] == 3
    bad = Path(other["videos"]) / "o1.mp4"
    bad.write_bytes(bad.read_bytes()[:600])
    options = ["--annotations", other["annotations"], "--videos", other["videos"]]
    # whether it was read before or not: features of another content are not used in its place
    with pytest.warns(UserWarning, match=r"1 of 3 videos left out: .*o1\.mp4"):
        results = evaluate(trained, tmp_path / "out", *options)
    assert results["results"]["trained"]["samples"] == 2
    assert results["left_out"]["counts"] == {"corrupt video": 1, "video missing": 1}
    assert "o1.mp4" in results["left_out"]["broken"]["o1"]
    assert results["left_out"]["examples"] == {"video missing": ["unknown"]}
    printed = capsys.readouterr().out
    assert "could not be read: o1" in printed and "video missing: 1 (unknown)" in printed
    command = ["ego4d", "--checkpoint", str(trained), "--out", str(tmp_path / "out"), "--device", "cpu", "--strict"]
    with pytest.warns(UserWarning, match="left out"):
        status = main([*command, *options])
    assert status == 1


def test_features_that_break_under_way_are_named(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        common.NarrationDataset,
        "__getitem__",
        lambda self, index, real=common.NarrationDataset.__getitem__: (
            real(self, index) if index != 2 else (_ for _ in ()).throw(ValueError("t2.safetensors: cut"))
        ),
    )
    results = evaluate(trained, tmp_path)
    assert results["results"]["trained"]["samples"] == 3
    assert results["left_out"]["broken"] == {"t2": "t2.safetensors: cut"}


def test_a_sweep_runs_every_budget_with_its_controls(trained, alone, tmp_path):
    sweep = ["--keep", "0.4", "1.0", "--router", "learned", "random", "uniform", "--blank", "--pairs", "2"]
    results = evaluate(trained, tmp_path, *sweep)["results"]
    assert list(results) == ["dense", "learned-0.4", "learned-1", "random-0.4", "uniform-0.4", "blanked"]
    own = alone[1]["results"]["trained"]
    assert results["learned-0.4"]["lm_ppl"] == pytest.approx(own["lm_ppl"], rel=1e-5)
    values = {results[name]["lm_ppl"] for name in results}
    assert len(values) == 6, "each of them is another model"
    counted = {name: value["compute"]["counted"] for name, value in results.items()}
    assert counted["dense"] == 1 and counted["learned-0.4"] < 0.9 < 0.99 < counted["learned-1"]
    assert counted["random-0.4"] < counted["learned-0.4"], "a router costs a little"
    assert results["random-0.4"]["compute"]["measured"] > 0
    assert (tmp_path / "quality_compute.png").stat().st_size > 5000
    assert set(samples(tmp_path, "blanked")) == {"t0", "t1", "t2", "t3"}


def test_a_sweep_leaves_the_model_as_trained(trained):
    model = load_model(find_run(trained))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    budgets = Budgets(model.llm)
    for variant in plan_variants(budgets.trained, [0.2, 1.0], ["learned", "uniform"], True):
        with budgets.using(variant.methods):
            assert mmskip.applied(model.llm) == list(variant.methods)
            if variant.series == "learned":
                router = model.state_dict()["llm.model.layers.1.mmskip_router.weight"]
                assert torch.equal(router, before["llm.model.layers.1.mmskip_router.weight"]) and router.any()
    assert mmskip.applied(model.llm) == list(budgets.trained)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_dense_checkpoint_has_no_learned_router_but_controls():
    with pytest.raises(ValueError, match="no learned router"):
        plan_variants([], [0.2], ["learned"], False)
    with pytest.raises(ValueError, match="trained without MoDConfig"):
        plan_variants([], [0.2], None, False)
    with pytest.raises(ValueError, match=r"router='random'"):
        plan_variants([mmskip.MoDConfig(router="random")], [0.2], ["learned"], False)
    names = [variant.name for variant in plan_variants([], [0.2, 1.0], ["random", "uniform"], False)]
    assert names == ["dense", "random-0.2", "uniform-0.2"]
    own = [mmskip.MoDConfig(keep=0.4)]
    names = [variant.name for variant in plan_variants(own, [0.2, 0.2], ["learned", "learned"], True)]
    assert names == ["dense", "learned-0.2", "trained", "blanked"], "the blanked one has its twin, nothing twice"
    own = [mmskip.MoDConfig(keep=0.4, router="mlp")]
    methods = [variant.methods for variant in plan_variants(own, [0.2], ["learned", "random"], False)[1:]]
    assert [config.router for (config,) in methods] == ["mlp", "random"]


def test_checkpoints_that_do_not_fit_are_one_clear_line(trained, tmp_path, capsys):
    def error(*options: str) -> str:
        assert main(["ego4d", "--device", "cpu", "--out", str(tmp_path / "out"), *options]) == 2
        return capsys.readouterr().err

    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    torch.save({"state_dict": {}, "hyper_parameters": {"width": 3}}, tmp_path / "other.ckpt")
    assert "nothing.ckpt: no such checkpoint" in error("--checkpoint", "nothing.ckpt")
    assert "there is no checkpoint" in error("--checkpoint", str(tmp_path))
    assert "not a checkpoint of a training run" in error("--checkpoint", str(tmp_path / "broken.ckpt"))
    assert "holds no video LLM but a model with width" in error("--checkpoint", str(tmp_path / "other.ckpt"))
    shutil.copy(find_run(trained).checkpoint, tmp_path / "alone.ckpt")
    assert "give --config" in error("--checkpoint", str(tmp_path / "alone.ckpt"))
    assert "--annotations and --videos belong together" in error("--checkpoint", str(trained), "--videos", ".")
    assert "batch_size must be at least 1" in error("--checkpoint", str(trained), "--batch-size", "0")
    assert "num_workers must be at least 0" in error("--checkpoint", str(trained), "--num-workers", "-1")
    assert "--format goalstep belongs to --annotations" in error("--checkpoint", str(trained), "--format", "goalstep")
    assert "is a file; give a folder" in error("--checkpoint", str(trained), "--out", str(tmp_path / "broken.ckpt"))
    assert "device is 'gpu'" in error("--checkpoint", str(trained), "--device", "gpu")
    state = torch.load(find_run(trained).checkpoint, weights_only=True)
    state["hyper_parameters"]["methods"][0]["class_path"] = "mmskip.NoSuchConfig"
    torch.save(state, tmp_path / "method.ckpt")
    assert "NoSuchConfig" in error("--checkpoint", str(tmp_path / "method.ckpt"))
    state["hyper_parameters"]["methods"] = []
    torch.save(state, tmp_path / "dense.ckpt")
    assert "its weights do not fit its settings" in error("--checkpoint", str(tmp_path / "dense.ckpt"))
    assert not (tmp_path / "out").exists()


def test_help_and_unknown_commands(capsys):
    assert main([]) == 0 and "ego4d" in capsys.readouterr().out
    assert main(["ego5d"]) == 2 and "expected one of ego4d" in capsys.readouterr().err
