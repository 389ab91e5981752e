"""benchmarks/mue.py end to end on a model of two steps: it trains, chooses, scores, times, draws, prints its line."""

import json
import sys
from pathlib import Path

import pytest
from captioning import TEXTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_benchmark_runs_through(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _measure
    import mue

    for module, name, value in ((mue, "FOLDER", tmp_path), (mue, "ROOT", tmp_path), (_measure, "RESULTS", tmp_path)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(mue, "QUANTILES", dict.fromkeys(mue.QUANTILES, (0.5,)))
    tiny = [f"--model.text={json.dumps(TEXTS['mbart'] | {'d_model': 64})}", "--trainer.fast_dev_run=false"]
    small = ["--data.generated.train=16", "--data.generated.val=2", "--data.generated.test=2", "--trainer.max_epochs=1"]

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["mue.py", *arguments])
        mue.main()

    for model in ("full", "shallow"):
        run("--train", model, *tiny, *small, "--trainer.check_val_every_n_epoch=1", "--model.max_new_tokens=6")
    run("--choose", "--count", "6")
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    assert {"full", "mue", "entropy", "patience"} <= set(chosen["caption"]) & set(chosen["entailment"])
    assert chosen["entailment"]["mue"]["layers"] <= chosen["entailment"]["full"]["layers"]
    run("--count", "33", "--timed", "4", "--pairs", "2")
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((tmp_path / "mue.json").read_text())
    for task in ("entailment", "caption"):
        assert {"full", "mue", "entropy", "patience", "random", "blanked", "shallow"} <= set(
            line["tasks"][task]["scores"]
        )
        assert set(line["tasks"][task]["times"]["mue"]) == {"1", "32"}
        assert (tmp_path / "docs" / f"mue_{task}_exits.png").is_file()
