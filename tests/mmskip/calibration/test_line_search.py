"""The search along a dial, and `python -m mmskip.search skip`."""

import json
import subprocess
import sys

import pytest
import torch
from drawing import diffusion_run, own_nets

import mmskip
from mmskip.search.__main__ import main
from mmskip.train.evaluation.generation.image_sampler import load_sampler, read_method
from mmskip.train.metrics.feature_nets import FeatureNet
from mmskip.train.search.skip_scale import feature_denoising_loss


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a tiny diffusion run."""
    return diffusion_run(tmp_path_factory.mktemp("search"))


@pytest.fixture
def options(run, tmp_path, monkeypatch):
    """Arguments of a small search."""
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    features = f"{own_nets(tmp_path)}:corners"
    base = ["skip", "--checkpoint", str(run), "--features", features, "--cache", str(tmp_path / "cache")]
    return [*base, "--out", str(tmp_path / "out"), "--samples", "8", "--points", "3", "--rounds", "2"]


def test_the_valley_is_found_to_the_promised_width():
    tried = []

    def score(x):
        tried.append(x)
        return (x - 0.63) ** 2

    found = mmskip.search(score, 0.0, 1.0, points=5, rounds=4, also=(1.0,))
    assert abs(found.best - 0.63) <= 0.25 / 8 and found.score == min(found.scores.values())
    assert tried[0] == 1.0 and len(tried) == len(set(tried)) == 5 + 3 * 2


def test_the_best_value_may_lie_at_an_end():
    found = mmskip.search(lambda x: x, 0.0, 1.0, points=3, rounds=3)
    assert found.best == 0.0 and set(found.scores) == {0.0, 0.125, 0.25, 0.5, 1.0}


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    file, tried = tmp_path / "s.json", []

    def score(x):
        if len(tried) == 3:
            raise KeyboardInterrupt
        tried.append(x)
        return abs(x - 0.4)

    with pytest.raises(KeyboardInterrupt):
        mmskip.search(score, 0.0, 1.0, points=5, rounds=3, file=file, settings={"a": [1]})
    assert len(json.loads(file.read_text())["evaluated"]) == 3
    again = []
    found = mmskip.search(
        lambda x: again.append(x) or abs(x - 0.4), 0.0, 1.0, points=5, rounds=3, file=file, settings={"a": [1]}
    )
    assert not set(again) & set(tried)
    assert found == mmskip.search(lambda x: abs(x - 0.4), 0.0, 1.0, points=5, rounds=3)
    with pytest.raises(ValueError, match=r"other settings \(a: \[1\] there, \[2\] now\)"):
        mmskip.search(score, 0.0, 1.0, file=file, settings={"a": [2]})


@pytest.mark.parametrize("bad", [{"low": 1.0}, {"points": 2}, {"rounds": 0}])
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError, match="expected low < high, points >= 3"):
        mmskip.search(lambda x: x, **{"low": 0.0, "high": 1.0, **bad})


def test_a_score_that_is_no_number_is_refused_and_not_kept(tmp_path):
    with pytest.raises(ValueError, match=r"score of 0.0 is nan"):
        mmskip.search(lambda x: float("nan"), 0.0, 1.0, file=tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()
    (tmp_path / "s.json").write_text("[]")
    with pytest.raises(ValueError, match="not a file of these results"):
        mmskip.search(lambda x: x, 0.0, 1.0, file=tmp_path / "s.json")


@pytest.mark.parametrize("metric", ["frechet", "denoising"])
def test_the_command_finds_rho_draws_the_curve_and_resumes(metric, options, run, tmp_path, capsys):
    given = [*options, "--nfe", "3", "5", "--metric", metric, "--course", "deepest"]
    assert main(given) == 0
    out = tmp_path / "out"
    kept = json.loads((out / "nfe5.json").read_text())
    scores = {row["value"]: row["score"] for row in kept["evaluated"]}
    assert {1.0, 0.5, 0.8, 1.1} <= set(scores)
    best = read_method(out / "best_nfe5.json")
    assert best.deepest == min(scores, key=scores.get) and best.shallowest == 1.0 and best.levels == "edm"
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    first = capsys.readouterr().out
    assert main(given) == 0
    again = capsys.readouterr().out
    assert "rho 0.8" in first and "rho 0.8" not in again
    assert first.split("NFE")[1] == again.split("NFE")[1]


def test_the_score_of_a_rho_is_that_of_the_network_with_this_scale(options, run, tmp_path):
    """Scores of the search are those of `evaluate.py fid` with the same scale, seed and images."""
    from mmskip.train.cli.evaluate import main as evaluate
    from mmskip.train.evaluation.generation.image_sampler import write_method

    assert main([*options, "--nfe", "3", "--seeds", "7"]) == 0
    scores = {r["value"]: r["score"] for r in json.loads((tmp_path / "out/nfe3.json").read_text())["evaluated"]}
    write_method(mmskip.SkipScaleConfig(scale=0.8), tmp_path / "m.json")
    shared = [o for o in options[1:] if o not in ("--points", "--rounds")][:-2]
    where = shared.index("--out") + 1
    shared[where] = str(tmp_path / "fid")
    assert evaluate(["fid", *shared, "--nfe", "3", "--seeds", "7", "--methods", str(tmp_path / "m.json")]) == 0
    row = json.loads((tmp_path / "fid/results.json").read_text())["results"][0]
    assert row["mean"]["frechet"] == pytest.approx(scores[0.8], rel=1e-5)


def test_a_perfect_denoiser_has_no_denoising_loss_and_an_untrained_one_has(run):
    image_sampler = load_sampler(str(run)).image_sampler
    from dataclasses import replace

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    net, real, labels = FeatureNet("mean", Mean(), None), torch.rand(6, 3, 16, 16), torch.arange(6)
    perfect = replace(image_sampler, denoiser=lambda number_B: lambda x, sigma: real[number_B])
    assert feature_denoising_loss(perfect, net, real, labels, 3, seed=0, batch_size=4) == 0
    assert feature_denoising_loss(image_sampler, net, real, labels, 3, seed=0) > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--nfe", "4"], "heun cannot make 4"),
        (["--low", "2"], "0 <= low < high"),
        (["--features", "none"], "features is 'none'"),
        (["--checkpoint", "nowhere"], "no such checkpoint"),
    ],
)
def test_bad_command_lines_are_one_clear_line(more, message, options, tmp_path, capsys):
    assert main([*options, *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_search_of_other_settings_is_not_mixed_in(options, capsys):
    assert main([*options, "--nfe", "3"]) == 0
    assert main([*options, "--nfe", "3", "--seeds", "5"]) == 2
    assert "other settings (seeds: [100] there, [5] now)" in capsys.readouterr().err


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mmskip.search", "--help"], capture_output=True, text=True, check=True)
    assert "skip" in done.stdout and "RuntimeWarning" not in done.stderr
