"""The quality benchmark: trainings that differ in one thing, kept by all their settings, and verdicts seed by seed."""

import json
import sys
from dataclasses import replace

import pytest
import yaml
from locations import BENCHMARKS
from narration_data import LLAMA


@pytest.fixture
def quality(monkeypatch, tmp_path):
    """The benchmark with a tiny recipe and a separate folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import mod_quality

    recipe = yaml.safe_load(mod_quality.CONFIG.read_text())
    recipe["model"]["init_args"]["llm"] = LLAMA
    generated = {"train": 2, "val": 2, "test": 1, "image_size": 32, "scene": {"ticks": 8}}
    recipe["data"]["init_args"] |= {"generated": generated, "max_frames": 8}
    recipe["trainer"]["max_epochs"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(mod_quality, "CONFIG", tmp_path / "recipe.yaml")
    monkeypatch.setattr(mod_quality, "ROOT", tmp_path)
    return mod_quality


def test_a_training_is_scored_word_by_word(quality):
    runs = [quality.Run(variant, 0, 2, split="val", data_seed=5) for variant in ("mod", "shallow")]
    for run in runs:
        quality.train(run)
    results = quality.summary({run.variant: [run] for run in runs})
    assert set(results["mod"]["words"]) >= {"article", "colour", "shape", "verb", "again"}
    assert {"mod", "shallow"} <= set(quality.table(results).split())
    assert [run.recipe()["model"]["init_args"]["llm"]["num_hidden_layers"] for run in runs] == [3, 2]


def test_results_are_kept_by_all_that_was_set(quality):
    run = quality.Run("mod", 0, 2)
    others = [replace(run, **change) for change in ({"seed": 1}, {"epochs": 3}, {"split": "val"}, {"data_seed": 100})]
    assert len({one.file for one in [run, *others]}) == 5
    assert json.loads(json.dumps(vars(run))) == vars(quality.Run(**vars(run)))


def test_words_are_sorted_by_what_decides_them(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from common.words import word_kinds

    assert word_kinds("the red bar hits the blue ring again") == [
        *("article", "colour", "shape", "verb", "fixed", "other colour", "other shape", "again", "again")
    ]
    assert word_kinds("another small red bar enters from the left") == [
        *("article", "size", "colour", "shape", "verb", "fixed", "fixed", "direction", "again")
    ]


def test_a_claim_is_judged_in_the_mean_and_in_every_seed(quality):
    def result(*ppl):
        return {"seeds": [{"lm_ppl": value} for value in ppl]}

    found = quality.verdicts(
        {"mod": result(1.2, 1.4), "dense": result(1.2, 1.38), "random": result(1.3, 1.35), "mod_blank": result(2.4)}
    )
    assert found["claims"]["within_2_percent_of_dense"] == {"in_the_mean": True, "in_every_seed": True}
    assert found["claims"]["better_than_random"] == {"in_the_mean": True, "in_every_seed": False}
    assert found["claims"]["blanking_mod_costs_20_percent"] is True
    assert found["over_mod"]["random"]["seeds"] == pytest.approx([1.3 / 1.2, 1.35 / 1.4])
    assert "better_than_shallow" not in found["claims"]


def test_the_benchmark_refuses_a_variant_it_does_not_know(quality, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mod_quality.py", "--only", "oracle"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "invalid choice: 'oracle'" in capsys.readouterr().err
