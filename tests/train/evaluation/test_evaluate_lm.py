"""`evaluate.py lm` on the trained language model of the data folder."""

import json
import math

import pytest
import torch
from locations import SHARED_DATA as DATA

import mmskip
from mmskip import LayerPlanConfig
from mmskip.train.cli.evaluate import main
from mmskip.train.evaluation.language_model import perplexity as lm
from mmskip.train.evaluation.language_model.perplexity import agreement, perplexity, text_windows

MODEL, TEXT = DATA / "stories260K", DATA / "text" / "tinystories_valid_5stories.txt"

NEEDS_DATA = pytest.mark.skipif(not MODEL.is_dir(), reason="needs ../shared/data/stories260K beside the repository")


def test_perplexity_is_that_of_the_tokens():
    from tiny_decoders import VOCAB, sharpen, tiny_decoder

    model = tiny_decoder("llama")
    sharpen(model)
    windows = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 9, 5)]
    with torch.no_grad():
        losses = [-model(w[None]).logits[0].log_softmax(-1)[range(len(w) - 1), w[1:]] for w in windows]
    expected = math.exp(torch.cat(losses).mean())
    assert perplexity(model, windows, batch=2) == (pytest.approx(expected, rel=1e-4), 8 + 8 + 4)
    mmskip.apply_(model, LayerPlanConfig(drop=(1, 2), phase="decode"))
    assert perplexity(model, windows, prompt=9)[0] == pytest.approx(expected, rel=1e-4)
    assert perplexity(model, windows, prompt=1)[0] != pytest.approx(expected, rel=1e-2)


def test_agreement_of_continuations():
    one = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    other = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4]])
    assert agreement(one, other) == {"rows_equal": 0.5, "tokens_before_difference": 0.625}


@NEEDS_DATA
def test_perplexity_of_whole_windows_is_that_of_the_notes_beside_the_data():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    text = TEXT.read_text(encoding="utf-8").replace("<|endoftext|>", "")
    full = [window for window in text_windows(tokenizer, text, 512) if len(window) == 512]
    assert perplexity(model, full) == (pytest.approx(4.226, abs=0.001), 3 * 511)


@NEEDS_DATA
def test_the_command_on_a_trained_model(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = mmskip.apply_(AutoModelForCausalLM.from_pretrained(MODEL), LayerPlanConfig(drop=(4,)))
    mmskip.save(model, tmp_path / "plan")
    out = tmp_path / "lm.json"
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8").replace("<|endoftext|>", ""), encoding="utf-8")
    call = ["lm", "--model", str(MODEL), "--adapter", str(tmp_path / "plan"), "--text", str(text), "--out", str(out)]
    assert main([*call, "--continuations", "1", "--new-tokens", "4"]) == 0
    found = json.loads(out.read_text())
    assert found["dense"]["perplexity"][str(text)] == {"perplexity": pytest.approx(4.17, abs=0.01), "tokens": 1827}
    assert found["changed"]["perplexity"][str(text)]["perplexity"] > 7
    assert 0 <= found["agreement"]["tokens_before_difference"] <= 1 and found["changed"]["seconds"]["token_s"] > 0
    assert "perplexity 4.17" in capsys.readouterr().out
    assert main(["lm", "--model", str(MODEL), "--text", str(tmp_path / "none.txt")]) == 2


TASK = """\
task: who_is_it
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@NEEDS_DATA
def test_tasks_of_the_harness_and_baselines(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="extra `lm-eval`")
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [
        {"text": "Once upon a time, there was a little", "choices": [" girl", " seven"], "label": 0},
        {"text": "She loved to play", "choices": [" of", " outside"], "label": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "who.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    mmskip.save(mmskip.apply_(AutoModelForCausalLM.from_pretrained(MODEL), LayerPlanConfig(drop=(0,))), tmp_path / "p")
    call = ["lm", "--model", str(MODEL), "--text", str(TEXT), "--limit", "600", "--continuations", "0"]
    call += ["--new-tokens", "4", "--adapter", str(tmp_path / "p"), "--out", str(tmp_path / "lm.json")]
    call += ["--task-path", str(tmp_path / "tasks")]
    assert main([*call, "--tasks", "who_is_it", "--prompt-lookup", "3", "--assistant-early-exit", "3"]) == 0
    found = json.loads((tmp_path / "lm.json").read_text())
    assert found["dense"]["tasks"]["who_is_it"]["acc"] == 1.0
    assert set(found["changed"]["tasks"]["who_is_it"]) == set(found["dense"]["tasks"]["who_is_it"])
    for baseline in found["baselines"].values():
        assert baseline["equal"] and baseline["seconds"]["token_s"] > 0
    assert "who_is_it: acc 1.0000" in capsys.readouterr().out
    monkeypatch.setattr(lm, "perplexity", lambda *_: pytest.fail("measured before the tasks were looked up"))
    assert main([*call, "--tasks", "no_such_task"]) == 2
    assert "no_such_task" in capsys.readouterr().err
