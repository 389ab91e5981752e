"""benchmarks/mue.py end to end on a model of two steps: it trains, chooses, scores, times, draws, prints its line."""

import json
import sys

import pytest
from captioning import TEXTS, captioner, data
from locations import ROOT

from mmskip import EarlyExitConfig
from mmskip.exits.settings import ExitAt


@pytest.mark.slow
def test_the_benchmark_runs_through(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _measure
    import _mue_observed
    import mue

    for module, name, value in ((mue, "FOLDER", tmp_path), (mue, "ROOT", tmp_path), (_measure, "RESULTS", tmp_path)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(_mue_observed, "QUANTILES", dict.fromkeys(_mue_observed.QUANTILES, (0.5,)))
    monkeypatch.setattr(mue, "ENCODERS", 1)
    monkeypatch.setattr(_mue_observed, "POINTS", (1,))
    tiny = [f"--model.text={json.dumps(TEXTS['mbart'] | {'d_model': 64})}", "--trainer.fast_dev_run=false"]
    small = ["--data.generated.train=16", "--data.generated.val=2", "--data.generated.test=2", "--trainer.max_epochs=1"]

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["mue.py", *arguments])
        mue.main()

    for model in ("full", "shallow"):
        run("--train", model, *tiny, *small, "--trainer.check_val_every_n_epoch=1", "--model.max_new_tokens=6")
    run("--choose", "--count", "6", "--timed", "2", "--pairs", "2")
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    for task in ("entailment", "caption"):
        found = chosen[task]
        assert {"full", "mue", "entropy", "patience", "fixed", "random", "mue_as_shallow"} <= set(found)
        assert found["mue"]["quality"] >= 0.96 * found["full"]["quality"] or task == "entailment"
        for way in ("entropy", "patience"):  # in no more time than MuE, or the fastest there is
            others = [one["measured"] for one in found["tried"] if one["way"] == way and "measured" in one]
            assert found[way]["measured"] <= found["mue"]["measured"] or found[way]["measured"] == min(others)
    run("--separate", "--count", "6")
    run("--count", "33", "--timed", "4", "--pairs", "2", "--clock", "cpu")
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((tmp_path / "mue.json").read_text())
    assert set(line["separation"]["caption"]["entropy"]) == {"full_base", "full"}
    for task in ("entailment", "caption"):
        found = line["tasks"][task]
        assert {"full", "mue", "entropy", "patience", "random", "blanked", "shallow"} <= set(found["scores"])
        assert set(found["times"]["mue"]) == set(found["times"]["random"]) == {"1", "32"}
        assert {"full", "besides_layers", "layers", "scores"} == set(found["times"]["where"])
        assert (tmp_path / "docs" / f"mue_{task}_exits.png").is_file()
        assert (tmp_path / "docs" / f"mue_{task}.png").is_file()


def test_random_exits_follow_the_given_depths(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from common import mue as _mue

    given = data(tmp_path, batch_size=4)
    model = captioner("mbart", given).eval()
    batches = [{**given.collate()([given.dataset("test")[n] for n in range(4)]), "caption": None}] * 12
    depths = [{"image": 1 + n % 2, "prompt": 2, "decoder": 3} for n in range(10)]
    setting = _mue.at_random(depths, model, EarlyExitConfig(decoder=ExitAt(0.99, exit_layers=(1, 2, 3))))
    assert setting.odds == {"image": pytest.approx([0.5, 1.0]), "text": [0.0, 1.0], "decoder": [0.0, 0.0]}
    assert _mue.Setting.from_dict(json.loads(json.dumps(setting.to_dict()))) == setting
    rows = _mue.records(model, "entailment", batches, setting, given.tokenizer)
    assert {row["prompt"] for row in rows} == {2}
    assert {row["decoder"] for row in rows} == {3}
    images = [row["image"] for row in rows]
    assert set(images) == {1, 2}
    assert 0.2 < images.count(1) / len(images) < 0.8
