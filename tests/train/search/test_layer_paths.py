"""Tree search over paths of layers, and `python -m mmskip.search cola`."""

import json
import re

import pytest
import torch
from locations import SHARED_DATA as DATA
from tiny_decoders import VOCAB, sharpen, tiny_decoder

import mmskip
from mmskip.calibration.layer_paths import PathSettings, Scored, neighbours, pareto, search_paths
from mmskip.search.__main__ import main
from mmskip.train.search import layer_paths as cola
from mmskip.utils.results import ResumableResults

MODEL, TEXT = DATA / "stories260K", DATA / "text" / "tinystories_valid_5stories.txt"
NEEDS_DATA = pytest.mark.skipif(not MODEL.is_dir(), reason="needs ../shared/data/stories260K beside the repository")


def test_actions_leave_out_or_repeat_up_to_four_neighbours():
    skipped = neighbours((0, 1, 2), 3, "skip")
    assert set(skipped) == {(1, 2), (0, 2), (0, 1), (2,), (0,)}
    looped = neighbours((0, 1), 2, "loop", longest=3)
    assert set(looped) == {
        *((0,) * n + (1,) for n in range(2, 6)),
        *((0,) + (1,) * n for n in range(2, 6)),
        *((0, 1) * n for n in range(2, 4)),
    }
    assert set(neighbours((0, 1), 2, "both", longest=1.5)) == {(1,), (0,), (0, 0, 1), (0, 1, 1)}


def test_the_pareto_set_is_kept():
    tried = [Scored((0,) * n, r) for n, r in ((3, 0.5), (2, 0.5), (4, 0.4), (4, 0.9), (1, 0.1), (5, 0.9))]
    assert [(s.length, s.reward) for s in pareto(tried)] == [(1, 0.1), (2, 0.5), (4, 0.9)]


def test_the_search_finds_paths_that_pay_and_repeats_itself():
    asked = []

    def reward(path):
        asked.append(path)
        if path == (1,):
            return None
        # needs 0 and 5, and is better when 2 runs twice
        return 0.6 * (path[0] == 0 and path[-1] == 5) + 0.4 * (path.count(2) == 2)

    settings = PathSettings(simulations=400, length_weight=1.0)
    found = search_paths(reward, 6, settings, seed=3)
    assert len(asked) == len(set(asked)) <= 401 and tuple(range(6)) in asked
    assert found[-1].reward == 1.0 and found[-1].length < 7
    assert found == search_paths(reward, 6, settings, seed=3) != search_paths(reward, 6, settings, seed=4)
    skipping = search_paths(reward, 6, PathSettings(actions="skip", simulations=200))
    assert all(scored.length <= 6 and scored.reward <= 0.6 for scored in skipping)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"actions": "jump"}, "actions"), ({"simulations": 0}, "simulations"), ({"explore": 1.5}, "explore")],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=f"{message} is"):
        PathSettings(**values)


def decoder():
    model = tiny_decoder("llama")
    sharpen(model)
    return model.eval()


@torch.no_grad()
def test_rewards_are_those_of_the_path():
    model, source = decoder(), torch.Generator().manual_seed(0)
    prompt, *choices = (tuple(torch.randint(3, VOCAB, (n,), generator=source).tolist()) for n in (7, 3, 4))
    blocks, logs = model.model.layers, []
    for choice in choices:
        ids = torch.tensor([[*prompt, *choice]])
        x = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
        for index in (0, 2, 2, 3):
            x = blocks[index](x, position_embeddings=rotary)
        log_probs = model.lm_head(model.model.norm(x))[0].log_softmax(-1)
        logs.append(float(torch.stack([log_probs[6 + i, token] for i, token in enumerate(choice)]).mean()))
    single = cola.Sample(prompt, (choices[1],))
    assert cola.path_reward(model, single, (0, 2, 2, 3)) == pytest.approx(float(torch.tensor(logs[1]).exp()), rel=1e-4)
    for right in (0, 1):
        sample = cola.Sample(prompt, tuple(choices), right)
        assert cola.path_reward(model, sample, (0, 2, 2, 3)) == float(logs[right] == max(logs))
    assert not mmskip.applied(model)
    hybrid = tiny_decoder("qwen3_next").eval()
    assert cola.path_reward(hybrid, single, (1, 0, 2, 3)) is None and not mmskip.applied(hybrid)


def test_a_search_goes_on_where_it_stopped(tmp_path):
    model, source = decoder(), torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCAB, (3, 8), generator=source).tolist()
    samples = [cola.Sample(tuple(row[:6]), (tuple(row[6:]),)) for row in rows]
    part = tmp_path / "part.json"

    def search(count, file=part, seed=0):
        results = ResumableResults(file, {"seed": seed})
        return cola.search_samples(model, samples[:count], PathSettings(simulations=12), seed, results)

    full = search(3, tmp_path / "whole.json")
    search(1)
    kept = part.read_text()
    assert search(1) == full[:1] and part.read_text() == kept
    assert search(3) == full
    assert search(1) == full  # finished rows are kept
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 now\)"):
        search(3, seed=1)
    for row in full:
        dense = [item for item in row["pareto"] if item["length"] <= 4]
        assert max(item["reward"] for item in dense) >= row["dense"] - 1e-6
    means = cola.summary(full, 4)
    assert means["oracle"] >= means["dense"] and 0 < means["as_good_length"] <= 1


@NEEDS_DATA
def test_the_command_says_that_it_is_an_oracle(tmp_path, capsys):
    file = tmp_path / "samples.jsonl"
    lines = [
        {"prompt": "Once upon a time, there was a little", "choices": [" girl", " seven"], "answer": 0},
        {"prompt": "Lily and Ben are", "answer": " friends"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    call = ["cola", "--model", str(MODEL), "--simulations", "6", "--out", str(tmp_path / "out")]
    assert main([*call, "--samples", str(file)]) == 0
    assert "oracle" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "cola.json").read_text())
    assert found["label"].startswith("oracle") and found["summary"]["samples"] == 2
    assert (tmp_path / "out" / "cola.png").stat().st_size > 5000
    assert main([*call, "--samples", str(file), "--limit", "1"]) == 0
    cut = json.loads((tmp_path / "out" / "cola.json").read_text())
    assert cut["samples"] == found["samples"] and cut["summary"]["samples"] == 1
    assert main([*call, "--text", str(TEXT)]) == 2
    assert re.search(r"other settings \(answer_tokens: .*; data: .*; samples: .*; window: ", capsys.readouterr().err)
    file.write_text(json.dumps(lines[1]))
    assert main([*call, "--samples", str(file)]) == 2
    assert re.search(r"other settings \(samples: [^;]*\); give another --out", capsys.readouterr().err)
    file.write_text('{"prompt": "x", "choices": ["a"], "answer": 3}')
    assert main([*call[:-1], str(tmp_path / "new"), "--samples", str(file)]) == 2
    assert "line 1" in capsys.readouterr().err
