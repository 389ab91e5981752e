"""The missingness report and `evaluate.py masking`."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from cnn_zoo import shake
from torch import nn

from mmskip.datasets.images import ImageData, embedded_images, open_images
from mmskip.train.cli.evaluate import main
from mmskip.train.evaluation.classifier.figures import stage_masks
from mmskip.train.evaluation.classifier.masking import default_patch
from mmskip.train.metrics.lime import agreement_with_objects, lime_agreement, lime_weights, ridge, top_agreement
from mmskip.train.metrics.missingness import (
    FILLS,
    MASKINGS,
    ORDERS,
    Answers,
    measure,
    patch_masks,
    patch_orders,
    predict,
    table,
)

MODEL_FILE = """
import torch
from torch import nn
from mmskip.train.evaluation.classifier.masking import Loaded

def tiny():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    return Loaded(net, 32)
"""


def tiny() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return shake(nn.Sequential(*layers, nn.Linear(8, 6)), 32)


@pytest.mark.parametrize("masking", MASKINGS)
def test_no_masking_shows_the_network_what_is_hidden(masking):
    if masking == "inpaint":
        pytest.importorskip("cv2")
    model, x = tiny(), torch.rand(4, 3, 32, 32)
    m = patch_masks(patch_orders(torch.zeros(4, 1, 32, 32), 8, "random"), 0.5, 32, 8)
    other = torch.where(m > 0, x, torch.rand(4, 3, 32, 32))
    assert torch.equal(predict(model, x, m, masking), predict(model, other, m, masking))
    if masking in FILLS:
        filled = FILLS[masking](x, m)
        torch.testing.assert_close(filled, FILLS[masking](other, m))
        torch.testing.assert_close(filled * m, x * m)
        assert torch.isfinite(FILLS[masking](x, torch.zeros_like(m))).all()


def test_orders_hide_what_they_say():
    scores = torch.zeros(1, 1, 32, 32)
    scores[..., :8, :8] = 1
    first, last = (patch_masks(patch_orders(scores, 8, o), 1 / 16, 32, 8) for o in ("salient first", "salient last"))
    assert first[0, 0, 0, 0] == 0 and last[0, 0, 0, 0] == 1
    assert first.sum() == last.sum() == 32 * 32 - 64


def test_metrics_of_answers():
    got = Answers.of(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 0]))
    assert (got.accuracy, got.classes, got.agreement) == (0.75, 2, 0.5)
    assert got.entropy == pytest.approx(math.log(2))


def test_the_report_recommends_the_best_and_restores_the_model():
    model, data = tiny().train(), embedded_images(24, 32)
    x = torch.stack([torch.from_numpy(data.read(i)).permute(2, 0, 1) / 255 for i in range(24)])
    objects = torch.from_numpy(data.objects)[:, None].float()
    maskings = [m for m in MASKINGS if m != "inpaint"]
    report = measure(model, x, torch.tensor(data.labels), objects, maskings, [0.3, 0.7], ORDERS, 8)
    assert report.score(report.recommended()) == max(map(report.score, maskings))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert set(report.shape["layer masking"]) == {"object", "rolled", "donor", "donor rolled"}
    assert "recommended for this checkpoint" in table(report)
    assert json.loads(json.dumps(report.to_dict()))["classes"] == 6


def test_the_command_writes_figures_and_pictures(tmp_path, capsys):
    file = tmp_path / "net.py"
    file.write_text(MODEL_FILE)
    maskings = ["black", "layer masking"]
    options = [
        "--limit",
        "12",
        "--lime-images",
        "1",
        "--lime-samples",
        "20",
        "--fractions",
        "0.5",
        "--orders",
        "random",
        "--maskings",
        *maskings,
    ]
    assert main(["masking", "--model", f"{file}:tiny", "--out", str(tmp_path / "out"), *options]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.json",
        "report.txt",
        "curves.png",
        "maskings.png",
        "stages.png",
    }
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["lime"]["black"]) == {"cosine", "top", "chance"}
    assert "recommended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet18"], "give --weights FILE, or --pretrained"),
        (["--model", "resnet1", "--weights", "x"], "timm has no model 'resnet1'"),
        (["--model", "nothing.py:net"], "names no function"),
        (["--model", "resnet18", "--fractions", "2"], "fractions are"),
        (["--model", "resnet18", "--lime-samples", "1"], "lime_samples 1; expected"),
    ],
)
def test_bad_arguments_are_one_clear_line(options, message, capsys):
    assert main(["masking", *options]) == 2
    assert message in capsys.readouterr().err


def test_lime_weights_agree_with_the_object_they_lie_on():
    segments = torch.arange(4).reshape(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    objects = (segments == 1).float()
    right = agreement_with_objects({0: 0.0, 1: 1.0, 2: 0.0, 3: 0.0}, segments, objects)
    wrong = agreement_with_objects({0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}, segments, objects)
    assert right > 0.8 > 0 > wrong


def test_the_best_segments_are_compared_with_those_of_the_object():
    segments = torch.arange(16).reshape(4, 4)
    objects = torch.zeros(4, 4)
    objects[0, :2] = 1
    weights = torch.zeros(16)
    weights[0], weights[5] = 2, 1
    assert top_agreement(weights, segments, objects) == 0.5


def test_the_regression_is_limes():
    on = (torch.rand(64, 6, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    truth = torch.tensor([1.0, -2, 0, 3, 0, 0.5]).double()
    torch.testing.assert_close(ridge(on, on @ truth + 7) / truth.abs().max(), truth / 3, rtol=0, atol=0.15)
    sklearn = pytest.importorskip("sklearn.linear_model")
    near = torch.exp(-((1 - on.mean(1).sqrt()) ** 2) / 0.25**2).sqrt()
    near = near / near.mean()
    theirs = sklearn.Ridge(alpha=1).fit(on.numpy(), (on @ truth + 7).numpy(), sample_weight=near.numpy())
    torch.testing.assert_close(ridge(on, on @ truth + 7), torch.from_numpy(theirs.coef_))


class RedThere(nn.Module):
    """Class 1 where the lower right corner is red."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        red = x[:, :1, 8:, 8:].mean((2, 3))
        return torch.cat([0.3 - red, red], 1) * 20


def test_lime_finds_the_corner_a_network_looks_at():
    x, objects = torch.full((1, 3, 16, 16), 0.9), torch.zeros(1, 1, 16, 16)
    objects[..., 8:, 8:] = 1
    found = lime_agreement(RedThere(), x, objects, ["black"], cells=4, samples=256)["black"]
    assert found["cosine"] > 0.9 and found["top"] == 1 and found["chance"] == 4 / 16
    segments = torch.zeros(16, 16, dtype=torch.long)
    segments[8:] = 1
    assert lime_weights(RedThere(), x[0], segments, "black", 32).argmax() == 1


def test_the_mask_of_every_resolution():
    layers = (nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1))
    m = torch.ones(1, 1, 16, 16)
    m[..., :8] = 0
    stages = stage_masks(nn.Sequential(*layers), torch.rand(1, 3, 16, 16), m)
    assert [(stage.name, *stage.size) for stage in stages] == [("image", 16, 16), ("1", 8, 8), ("3", 4, 4)]
    assert stages[1].m[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert stages[2].m[0, 0, 0].tolist() == [0, 1, 1, 1]


def test_sources_of_images(tmp_path):
    from PIL import Image

    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    for name in ("a", "b"):
        (tmp_path / "folders/val" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "folders/val" / name / "1.png")
    (tmp_path / "listed").mkdir()
    Image.fromarray(pixels).save(tmp_path / "listed/1.png")
    (tmp_path / "listed/labels.csv").write_text("file,class_index,name\n1.png,3,cat\n")
    np.savez(tmp_path / "set.npz", images=pixels[None], labels=np.array([1]))
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar/test_batch.bin").write_bytes(bytes([7]) + bytes(range(256)) * 12)
    folders, listed, arrays, cifar = (open_images(tmp_path / n) for n in ("folders", "listed", "set.npz", "cifar"))
    assert folders.labels == [0, 1] and folders.class_names == ["a", "b"] and (folders.read(1) == pixels).all()
    assert listed.labels == [3] and listed.class_names[3] == "cat"
    assert (arrays.read(0) == pixels).all()
    assert cifar.labels == [7] and cifar.read(0).shape == (32, 32, 3)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/t10k-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 9, 8, 7, 6])
    )
    (tmp_path / "mnist/t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 1, 4])))
    digits = open_images(tmp_path / "mnist")
    assert digits.labels == [4] and digits.read(0)[..., 2].tolist() == [[9, 8], [7, 6]]
    with pytest.raises(ValueError, match="has no train-images-idx3-ubyte"):
        open_images(tmp_path / "mnist", "train")
    (tmp_path / "mnist/t10k-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 9]))
    with pytest.raises(ValueError, match="is cut short"):
        open_images(tmp_path / "mnist")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a folder nor"):
        open_images(tmp_path / "none")
    with pytest.raises(ValueError, match="unpickling runs code"):
        open_images(tmp_path / "empty")


def test_images_for_diffusion_are_signed_and_may_be_grey_or_enlarged():
    for channels in (1, 3):
        data = ImageData(
            image_size=32, generated_size=16, signed=True, channels=channels, train_count=6, val_count=6, batch_size=6
        )
        data.setup()
        (batch,) = data.val_dataloader()
        assert batch["image"].shape == (6, channels, 32, 32) and data.sets["val"].read(0).shape == (16, 16, 3)
        assert -1 <= batch["image"].min() < -0.3 and batch["image"].max() <= 1
    with pytest.raises(ValueError, match="channels is 2"):
        ImageData(channels=2)


def test_patches_divide_the_image():
    assert [default_patch(s) for s in (224, 160, 32)] == [16, 10, 2]
    with pytest.raises(ValueError, match="expected a divisor"):
        measure(tiny(), torch.rand(2, 3, 32, 32), torch.zeros(2).long(), None, ["black"], [0.5], ["random"], 5)
