"""Benchmarks run on tiny shapes and print what they promise. No test asserts a time."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


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


def test_half_a_model_is_timed_beside_its_ideal(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import argparse

    import depth

    found = depth.half_dropped(argparse.Namespace(tiny=True, pairs=2, new_tokens=3))
    # half the blocks are left out; the output head is not
    assert 1.2 < found["half"]["ideal"] < 2 and found["half"]["speedup"] > 0
    assert "nearest reachable" in found["balanced"]["report"]
