"""Benchmarks run on tiny shapes and print what they promise. No test asserts a time."""

import json
import sys

import pytest
from locations import BENCHMARKS


@pytest.mark.parametrize(
    ("family", "contenders"), [("llama", ["mod", "fastv", "similarity"]), ("qwen2_5_vl", ["fastv", "mod"])]
)
def test_every_phase_of_a_family_is_measured_beside_its_ideal(family, contenders, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import mod_models

    out = tmp_path / "result.json"
    arguments = ["--tiny", "--device", "cpu", "--pairs", "2", "--only", family, "--contenders", *contenders]
    monkeypatch.setattr(sys, "argv", ["mod_models.py", *arguments, "--out", str(out)])
    mod_models.main()
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    for phase in ("prefill", "decode", "train"):
        rows = result["families"][family][phase]
        assert set(rows) == set(contenders)
        assert all(row["pairs"] == 2 and row["speedup"] > 0 for row in rows.values())
    ideals = [row["ideal"] for row in result["families"][family]["prefill"].values()]
    assert min(ideals) > 1.05 and max(ideals) < 1.15 * min(ideals), "one budget for all"


def test_kernels_are_checked_and_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernels

    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--tiny", "--device", "cpu", "--pairs", "2", "--out", str(out)])
    kernels.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["max_difference"]["float32"]["attention"] < 1e-5
    assert all(result[name]["ideal"] > 1 for name in ("attention", "attention_windowed", "decoding"))
    assert {path["name"] for path in result["paths"].values()} == {"torch"}


def test_half_a_model_is_timed_beside_its_ideal(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import argparse

    import depth

    kept = depth.Kept(tmp_path / "depth.json")
    depth.half_dropped(argparse.Namespace(tiny=True, pairs=2, new_tokens=3, clock="wall"), kept)
    found = json.loads((tmp_path / "depth.json").read_text())["half_dropped"]
    # half the blocks are left out; the output head is not
    assert 1.2 < found["half"]["ideal"] < 2 and found["half"]["speedup"] > 0
    assert "nearest reachable" in found["balanced 1.5"]["report"]
    kept.once("half", lambda: pytest.fail("a figure that is there is not made again"), "half_dropped")


def test_guided_choices_are_compared_with_random_ones_of_their_size(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import depth

    rows = {"llm_drop block 2": {"text": 3.0}, "llm_drop attn 2": {"text": 1.0}, "llm_drop joint 2": {"text": 1.0}}
    rows |= {f"random block 2 seed {i}": {"text": v} for i, v in enumerate((2.0, 4.0, 6.0))}
    rows |= {"random block 4 seed 0": {"text": 9.0}, "random block 2 seed 9": {"refused": "no"}}
    rows |= {"bits 8/4 average 6.00 lim": {"text": 2.0}, "bits 8/4 average 6.00 random seed 0": {"text": 5.0}}
    found = depth.guided(rows, "llm_drop", "random {drop} seed")
    assert list(found) == ["llm_drop block 2"]
    scores = found["llm_drop block 2"]["text"]
    assert scores["random_mean"] == 4.0 and scores["random_worse"] == "2 of 3" and scores["random_best"] == 2.0
    assert depth.guided(rows, "bits", "{bits} random seed")["bits 8/4 average 6.00 lim"]["text"]["random_mean"] == 5.0


@pytest.mark.slow
@pytest.mark.skipif(
    not (BENCHMARKS.parent.parent / "shared" / "data" / "text").is_dir(), reason="needs ../shared beside the repository"
)
def test_the_deeper_model_is_trained_without_the_report_texts_and_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import deep_lm
    from transformers import AutoModelForCausalLM

    split = deep_lm.parts("sherlock")
    joined = "".join(split.values())
    assert 0.89 < len(split["train"]) / len(joined) < 0.91 and min(map(len, split.values())) > 0.04 * len(joined)
    assert joined == (deep_lm.DATA / "text" / "sherlock.txt").read_text(encoding="utf-8")
    call = ["--variant", "skipped", "--steps", "2", "--rows", "1", "--length", "17", "--every", "1", "--choose", "1"]
    arguments = deep_lm.parser().parse_args([*call, "--out", str(tmp_path / "model")])
    folder = deep_lm.make(arguments)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 12
    training = json.loads((folder / "training.json").read_text())
    assert [row["step"] for row in training["history"]] == [1, 2] and training["steps"] == 2
    capsys.readouterr()
    deep_lm.make(arguments)
    assert "is there" in capsys.readouterr().out
