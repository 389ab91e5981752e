"""`evaluate.py fid`: feature networks, cached references, what it writes and what it refuses."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from drawing import classifier_checkpoint, diffusion_run, own_nets

import mmskip
from mmskip.models.diffusion.samplers import SAMPLERS, evaluations_of, steps_of
from mmskip.train.cli.evaluate import main
from mmskip.train.evaluation.generation.image_sampler import FidScorer, load_sampler, read_method, write_method
from mmskip.train.metrics import feature_nets
from mmskip.train.metrics.feature_nets import FeatureNet, open_feature_net


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a tiny diffusion run."""
    return diffusion_run(tmp_path_factory.mktemp("fid"))


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A file with feature networks of a user's own."""
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    return own_nets(tmp_path)


def options(run, net, folder, *more):
    base = ["fid", "--checkpoint", str(run), "--features", net, "--cache", str(folder / "cache"), "--grid", "2"]
    return [*base, "--out", str(folder / "out"), "--samples", "10", "--seeds", "0", "1", *more]


def test_training_reports_its_loss_beside_two_that_know_nothing_and_draws(run):
    (folder,) = run.iterdir()
    results = json.loads((folder / "results.json").read_text())
    losses = results["val_loss"]
    assert losses["model"] != losses["untrained"] and losses["pixel_spread"] > 0
    # a denoiser of the right spread has about the full weighted error
    assert 0.3 < losses["pixel_spread"] < 3
    assert results["nfe_of_samples"] == [9, 35]
    assert (folder / "samples.png").is_file()


def test_the_command_writes_figures_and_pictures_and_caches_the_real_images(run, nets, tmp_path, capsys, monkeypatch):
    assert main(options(run, f"{nets}:corners", tmp_path, "--nfe", "3", "5")) == 0
    assert "Frechet" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["nfe"] for row in results["results"]] == [3, 5]
    assert results["feature_count"] == 4 and results["real_images"] == 24 and results["notes"] == []
    assert {"samples_nfe3.png", "samples_nfe5.png", "report.txt"} <= {p.name for p in (tmp_path / "out").iterdir()}
    (cached,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("mmskip.train.evaluation.generation.image_sampler.pixels", lambda *a: pytest.fail("read again"))
    assert main(options(run, f"{nets}:corners", tmp_path, "--nfe", "3")) == 0
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert again["results"][0]["mean"] == results["results"][0]["mean"] and list(cached.parent.iterdir()) == [cached]


def test_other_real_images_and_another_network_have_their_own_cache(run, nets, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 255, (9, 8, 8), np.uint8), labels=np.arange(9) % 3)
    assert main(options(run, f"{nets}:corners", tmp_path)) == 0
    assert main(options(run, f"{nets}:corners", tmp_path, "--real", str(tmp_path / "a.npz"))) == 0
    far = json.loads((tmp_path / "out/results.json").read_text())
    assert far["real_images"] == 9
    assert main(options(run, str(classifier_checkpoint(tmp_path)), tmp_path)) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["feature_count"] == 6
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_method_in_a_file_is_put_on_the_network(run, nets, tmp_path):
    path = write_method(mmskip.SkipScaleConfig(scale=0.2), tmp_path / "half.json", note="by hand")
    assert read_method(path) == mmskip.SkipScaleConfig(scale=0.2)
    found = []
    for more in ([], ["--methods", str(path)]):
        assert main(options(run, f"{nets}:corners", tmp_path, *more)) == 0
        found.append(json.loads((tmp_path / "out/results.json").read_text()))
    assert found[0]["results"][0]["mean"] != found[1]["results"][0]["mean"]
    assert found[1]["methods"][0]["config"]["scale"] == 0.2


def test_the_frechet_distance_agrees_with_torchmetrics_on_the_same_features(run, nets):
    """Through torchmetrics' own class, which gets the same network and the same images."""
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    corners = open_feature_net(f"{nets}:corners")
    fake, _ = load_sampler(str(run)).image_sampler.draw(60)
    real = torch.rand(80, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 1
    metric = fid(feature=corners.module, normalize=True, input_img_size=(3, 16, 16))
    metric.update((real + 1) / 2, real=True)
    metric.update((fake + 1) / 2, real=False)
    expected = float(metric.compute())
    assert FidScorer(corners, corners(real)).frechet(fake) == pytest.approx(expected, rel=1e-3) and expected > 0.01


def test_fewer_images_than_features_are_reported_with_the_consequence(run, nets, tmp_path, capsys):
    assert main(options(run, f"{nets}:wide", tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "10 images and 768 features: the covariance is singular" in printed and "kernel distance" in printed
    notes = json.loads((tmp_path / "out/results.json").read_text())["notes"]
    assert len(notes) == 2  # of the real and of the drawn images, once each though there are two seeds


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("picky", r"does not fit images \(3, 16, 16\)"),
        ("blind", "gives the same features for all 24 images"),
        ("feature_map", r"expected one vector per image"),
        ("nothing", "has no function 'nothing'"),
    ],
)
def test_a_feature_network_that_does_not_fit_is_refused(net, message, run, nets, tmp_path, capsys):
    assert main(options(run, f"{nets}:{net}", tmp_path)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "resnet99"], "features is 'resnet99'"),
        (["--features", "inception:none.pth"], "none.pth is no file"),
        (["--features", "open_clip:none.bin"], "expected a run or checkpoint"),
        (["--checkpoint", "nowhere"], "no such checkpoint"),
        (["--nfe", "4"], "heun cannot make 4 function evaluations"),
        (["--samples", "2"], "samples is 2"),
        (["--seeds", "1", "1"], "different integers"),
        (["--guidance", "2"], "label_dropout > 0"),
        (["--real", "nowhere"], "neither a folder nor an .npz"),
        (["--methods", "nowhere.json"], "holds no method"),
        (["--real-count", "1"], "real_count is 1"),
    ],
)
def test_bad_arguments_are_one_clear_line(more, message, run, nets, tmp_path, capsys):
    assert main(options(run, f"{nets}:corners", tmp_path, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_is_refused(nets, tmp_path, capsys):
    assert main(options(classifier_checkpoint(tmp_path), f"{nets}:corners", tmp_path)) == 2
    assert "no checkpoint of a Diffusion" in capsys.readouterr().err


def test_inception_weights_as_a_file(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, init_weights=False)
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    opened = open_feature_net(f"inception:{tmp_path / 'inception.pth'}")
    assert opened.size == 299 and opened(torch.rand(2, 1, 32, 32)).shape == (2, 2048)
    (tmp_path / "bad.pth").write_bytes((tmp_path / "inception.pth").read_bytes())
    torch.save({"x": torch.ones(1)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="does not hold the weights of Inception3"):
        open_feature_net(f"inception:{tmp_path / 'bad.pth'}")


def test_a_model_of_timm_with_its_weights_as_a_file(tmp_path):
    import timm
    from safetensors.torch import save_file

    net = timm.create_model("test_resnet", pretrained=False)
    save_file(net.state_dict(), str(tmp_path / "w.safetensors"))
    opened = open_feature_net(f"timm:test_resnet:{tmp_path / 'w.safetensors'}")
    x = torch.rand(3, 3, 20, 20) * 2 - 1
    assert opened(x).shape[0] == 3 and opened(x).dim() == 2
    with pytest.raises(ValueError, match="timm has no model"):
        open_feature_net(f"timm:no_such:{tmp_path / 'w.safetensors'}")


def test_an_open_clip_model_with_its_weights_as_a_file(tmp_path, monkeypatch):
    import open_clip

    tiny = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
    }
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny-clip.json").write_text(json.dumps(tiny))
    open_clip.add_model_config(folder)
    net = open_clip.create_model("tiny-clip")
    torch.save(net.state_dict(), tmp_path / "clip.pt")
    opened = open_feature_net(f"open_clip:tiny-clip:{tmp_path / 'clip.pt'}")
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert opened.size == 32 and opened(x).shape == (2, 8)
    with pytest.raises(ValueError, match="open_clip has no model 'no-clip'"):
        open_feature_net(f"open_clip:no-clip:{tmp_path / 'clip.pt'}")


def test_images_reach_a_feature_network_in_0_to_1_with_three_channels():
    seen = []

    class Keep(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean((2, 3))

    grey = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    FeatureNet("keep", Keep(), 8)(grey)
    assert seen[0].shape == (2, 3, 8, 8) and seen[0].min() >= 0 and seen[0].max() <= 1
    with pytest.raises(ValueError, match=r"expected \[N, 1 or 3, H, W\]"):
        FeatureNet("keep", Keep(), 8)(torch.zeros(2, 4, 4, 4))
    assert "inception:FILE" in feature_nets.KINDS


def test_steps_and_evaluations_of_the_samplers():
    for sampler in SAMPLERS:
        assert steps_of(sampler, evaluations_of(sampler, 5)) == 5
    with pytest.raises(ValueError, match="an odd number"):
        steps_of("heun", 8)
    with pytest.raises(ValueError, match="a number >= 1"):
        steps_of("euler", 0)
    with pytest.raises(ValueError, match="expected one of euler"):
        steps_of("rk4", 8)
