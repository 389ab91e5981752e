"""The benchmark of skip scales on a tiny run, and the two networks that belong to no library."""

import importlib
import json

import pytest
import torch
from drawing import diffusion_run, own_nets
from locations import ROOT

import mmskip
from mmskip.families import find
from mmskip.models.diffusion.samplers import ImageSampler

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(name)


def test_a_tiny_run_reports_every_rival_and_resumes(benchmark_module, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    skip_tuning = benchmark_module("skip_tuning")
    given = ["--checkpoint", str(diffusion_run(tmp_path)), "--features", f"{own_nets(tmp_path)}:corners"]
    given += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path), "--nfe", "3", "--samples", "8"]
    given += ["--grid", "0.8", "0.9", "1.0", "--rounds", "1", "--cache-nfe", "3", "--intervals", "2", "--pairs", "2"]
    skip_tuning.main([*given, "--timed", "2"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    found = result["by_nfe"]["3"]
    assert set(found["search"]) == {"0.8", "0.9", "1.0"} and float(found["best_rho"]) in (0.8, 0.9, 1.0)
    assert all(len(found[name]) == 3 for name in ("plain", "skip_scale", "random", "freeu"))
    (row,) = result["step_caching"]
    assert row["ideal"] > 1 and row["frechet"] != row["frechet_plain"]
    assert (tmp_path / "skip_tuning.png").stat().st_size > 1000
    skip_tuning.main([*given, "--timed", "2", "--cache-nfe"])
    printed = capsys.readouterr().out
    assert "NFE   3 seed" not in printed
    assert json.loads(printed.strip().splitlines()[-1])["by_nfe"] == result["by_nfe"]


def test_search_and_report_seeds_are_kept_apart(benchmark_module):
    skip_tuning = benchmark_module("skip_tuning")
    with pytest.raises(SystemExit):
        skip_tuning.arguments(["--checkpoint", "a", "--features", "b", "--search-seed", "1"])
    plain, better = [1.0, 1.0, 1.0], [0.8, 0.8, 0.85]
    draws = [{"scale": 1.0, "distances": distances} for distances in ([0.7, 0.7, 0.8], [0.7, 0.9, 0.8])]
    found = {"best_rho": 0.9, "plain": plain, "skip_scale": better, "random": plain, "freeu": plain}
    found["random_draws"] = draws
    assert skip_tuning.verdict({9: found})["9"]["draws_better"] == 1
    assert skip_tuning.verdict({9: found})["9"]["holds"]
    assert not skip_tuning.verdict({9: {**found, "skip_scale": [0.8, 0.8, 0.95]}})["9"]["holds"]
    assert not skip_tuning.verdict({9: {**found, "random": [0.7, 0.9, 0.9]}})["9"]["holds"]


def test_random_scales_are_as_large_as_the_found_change_and_come_in_pairs(benchmark_module):
    drawn = [torch.tensor(benchmark_module("skip_tuning").random_scales(0.7, 9, draw).scale) for draw in range(4)]
    for scales in drawn:
        assert float((scales - 1).square().mean().sqrt()) == pytest.approx(0.3, abs=1e-4)
    ones = torch.ones(9)
    torch.testing.assert_close((drawn[0] + drawn[1]) / 2, ones, atol=1e-5, rtol=0)
    torch.testing.assert_close((drawn[2] + drawn[3]) / 2, ones, atol=1e-5, rtol=0)
    assert not torch.allclose(drawn[0], drawn[2], atol=0.01)


def test_random_scales_beside_a_course_have_its_size_and_window(benchmark_module):
    course = mmskip.SkipScaleConfig(deepest=0.2, shallowest=1.0, schedule="window", window=(1.0, 20.0), levels="edm")
    beside = benchmark_module("common.skip_probes").random_course(course, 5, 1)
    size = torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0]).square().mean().sqrt()
    scales = torch.tensor(beside.scales(5))
    assert float((scales - 1).square().mean().sqrt()) == pytest.approx(float(size), abs=1e-4)
    assert (beside.schedule, beside.window, beside.levels) == (course.schedule, course.window, course.levels)


def test_the_overhead_benchmark_compares_equal_networks(benchmark_module, tmp_path, capsys):
    given = ["--widths", "8", "8", "--size", "8", "--batch", "1", "--pairs", "2", "--out", str(tmp_path / "o.json")]
    benchmark_module("skip_overhead").main(given)
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["bit_equal"] and result["shape"]["skips"] == 6


def test_a_network_described_from_outside_is_scaled_at_its_concatenations(benchmark_module):
    ddpm = benchmark_module("prepare.ddpm_unets")
    torch.manual_seed(0)
    unet = ddpm.DdpmUNet().eval()
    assert not benchmark_module("common.skip_probes").has_two_paths(unet)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([10, 900])
    view = find(unet, ("unet",))
    assert [skip.channels for skip in view.skips] == [80, 40, 20]
    with torch.no_grad():
        plain = unet(x, t)
        mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=[0.5, 1.0, 0.7]))
        scaled = unet(x, t)
        mmskip.remove_(unet)
        seen = {}
        for index, (join, factor) in enumerate(((unet.join1, 0.5), (unet.join3, 0.7))):
            # a naive reference: multiply the first half where it is concatenated
            def scale(module, args, factor=factor, index=index):
                seen[index] = args[0].shape[1]
                half = args[0].shape[1] // 2
                return (torch.cat([args[0][:, :half] * factor, args[0][:, half:]], 1),)

            join.register_forward_pre_hook(scale)
        assert torch.equal(unet(x, t), scaled) and seen == {0: 80, 1: 20}
    assert not torch.equal(plain, scaled)


@pytest.mark.skipif(not (SHARED / "diffusion").is_dir(), reason="the trained networks (../shared/data) are not here")
@pytest.mark.parametrize(("name", "expected"), [("mnist", 0.0275), ("fashion", 0.0446)])
def test_the_trained_networks_predict_noise_as_their_source_says(name, expected, benchmark_module):
    import numpy as np

    files = {"mnist": "mnist/mnist_test_first6667.npz", "fashion": "fashion_mnist/fashion_mnist_sprite_600.npz"}
    ddpm = benchmark_module("prepare.ddpm_unets")
    image_sampler = getattr(ddpm, name)()
    x = torch.from_numpy(np.load(SHARED / files[name])["images"][:300]).float()[:, None] / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        found = image_sampler.unet(kept.sqrt() * x + (1 - kept).sqrt() * noise, t)
    # on 1,000 images in the source's figure
    assert float((found - noise).square().mean()) == pytest.approx(expected, rel=0.1)
    images, evaluations = image_sampler.draw(2, sampler="dpm++", steps=3)
    assert evaluations == 3 and images.min() == -1 and images.max() == 1


@pytest.mark.parametrize(("groups", "expected"), [(1, [0.0, 0.0, 0.0, 0.0]), (4, [1.0, 1.0, 1.0, 1.0]), (3, None)])
def test_the_share_of_a_skip_that_the_next_normalisation_cancels(benchmark_module, groups, expected):
    from diffusers import UNet2DModel

    probes = benchmark_module("common.skip_probes")
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(12, 12),
        layers_per_block=1,
        norm_num_groups=groups,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).eval()
    assert probes.has_two_paths(unet)
    shares = probes.cancelled(unet)
    # three groups of 24 channels, skips of 12: the one that begins with the skip has 8 of its 12 channels
    assert shares == (expected or [pytest.approx(2 / 3)] * 4)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(0.3)
    with torch.no_grad():
        plain = unet(x, t).sample
        with probes.changed(unet, mmskip.SkipScaleConfig(scale=0.5, target="norm")):
            moved = float((unet(x, t).sample - plain).abs().max())
        assert torch.equal(unet(x, t).sample, plain)
    assert moved < 1e-2 if groups == 4 else moved > 1e-2


def test_the_study_reports_a_case_and_keeps_the_others(benchmark_module, monkeypatch, tmp_path, capsys):
    study = benchmark_module("skip_effect")
    run, nets = diffusion_run(tmp_path), own_nets(tmp_path)
    monkeypatch.chdir(tmp_path)
    case = study.Case("tiny", str(run), features=f"{nets}:corners", nfe=(3,), samples=8, ways=(3,))
    monkeypatch.setattr(study, "CASES", {"one": case, "two": study.dataclasses.replace(case, noise=True, ways=())})
    study.main(["two", "--out", str(tmp_path)])
    study.main(["one", "--out", str(tmp_path)])
    cases = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["cases"]
    assert list(cases) == ["one", "two"]
    found = cases["one"]["by_nfe"]["3"]
    assert all(len(found[name]) == 3 for name in ("plain", "skip_scale", "random", "noise_scale"))
    assert len(found["ways"]) == 10 and sum("random" in way for way in found["ways"].values()) == 1
    assert len(found["random_draws"]) == 8 and "0.99" in found["noise_search"]
    # the same checkpoint as EDM and as a predictor of noise: two networks, two files of distances
    files = sorted((tmp_path / "runs" / "skip_tuning_bench").iterdir(), key=lambda file: len(file.stem))
    assert len(files) == 2 and files[1].stem == f"{files[0].stem}-noise"
    assert found["plain"] != cases["two"]["by_nfe"]["3"]["plain"]
    assert cases["one"]["network"] != cases["two"]["network"]
    assert found["unconverged"]["moved"] > 0 and cases["one"]["reach"]["1.0"]["shift_residual"] > 0
    assert (tmp_path / "skip_effect.png").stat().st_size > 1000


def test_the_noise_scale_moves_between_the_image_and_its_denoised_form(benchmark_module):
    probes = benchmark_module("common.skip_probes")
    image_sampler = ImageSampler(torch.nn.Identity(), lambda number: lambda x, sigma: 0 * x, (1, 2, 2), 0.1, 1.0)
    x, numbers = torch.randn(3, 1, 2, 2), torch.arange(3)
    for s in (0.0, 0.5, 1.0):
        assert torch.allclose(
            probes.with_noise_scale(image_sampler, s).denoiser(numbers)(x, torch.ones(3)), (1 - s) * x
        )


class Echo(torch.nn.Module):
    """A network that returns its input."""

    def forward(self, x, t):
        return type("Output", (), {"sample": x})


def test_noise_prediction_learns_the_noise_with_equal_weight(benchmark_module):
    model = benchmark_module("skip_effect").NoisePrediction(
        {
            "sample_size": 8,
            "block_out_channels": [8],
            "norm_num_groups": 4,
            "down_block_types": ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"],
        }
    )
    clean, noise = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    sigma = torch.tensor([-2.0, -1.0, 0.0, 2.0]).exp().view(-1, 1, 1, 1)
    predicted = (clean + sigma * noise) / (1 + sigma**2).sqrt()
    loss = model._loss(Echo().train(), {"image": clean}, noise, sigma.flatten().log())
    assert float(loss) == pytest.approx(float((predicted - noise).square().mean()), rel=1e-4)
    x, level = torch.tensor([0.5, 8.0]).view(2, 1, 1, 1), torch.tensor([1.0, 0.1])
    denoised = model.eval().denoise(Echo(), x, level).flatten()
    assert denoised.tolist() == pytest.approx([0.5 - 0.5 / 2**0.5, 1.0], rel=1e-5)


def test_a_case_is_trained_when_it_has_no_checkpoint(benchmark_module, monkeypatch, tmp_path):
    study, calls = benchmark_module("skip_effect"), []
    monkeypatch.setattr(study, "train", calls.append)
    run = tmp_path / "tiny"
    recipe = ("unet.norm_num_groups=1", "log_sigma_std=1.7", "data.flip=false", "max_epochs=3")
    case = study.Case("tiny", str(run), recipe, noise=True)
    (run / "20260101-000000" / "checkpoints").mkdir(parents=True)  # as an interrupted training leaves it
    study.trained(case)
    assert calls == [
        [
            *("--config", "skip_tuning.yaml", "--name", "tiny", "--model=skip_effect.NoisePrediction"),
            *("--model.unet.norm_num_groups=1", "--model.log_sigma_std=1.7", "--data.flip=false"),
            *("--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=3", "--trainer.enable_progress_bar=false"),
        ]
    ]
    (run / "20260101-000000" / "checkpoints" / "last.ckpt").touch()
    study.trained(case)
    study.trained(study.Case("outside", "benchmarks/prepare/ddpm_unets.py:mnist"))
    assert len(calls) == 1


def test_values_of_rho_within_a_hundredth_of_the_best_are_listed(benchmark_module):
    near = benchmark_module("skip_effect")._near_best
    assert near({"0.5": 1.02, "0.6": 1.005, "0.7": 1.0, "0.8": 1.009, "0.9": 1.2}) == (0.6, 0.8)
