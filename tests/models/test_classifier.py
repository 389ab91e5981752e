"""The classifier: what is hidden in training, its checkpoint, and what it refuses."""

import pytest
import torch
from lightning.pytorch import Trainer

import mmskip
from mmskip.datasets.images import ImageData
from mmskip.models.classifier import Classifier
from mmskip.train.cli.evaluate import main

TINY = {"model": "resnet18", "model_kwargs": {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}}
VIT = {"model": "vit_tiny_patch16_224", "model_kwargs": {"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": 32}}


def trained(folder, **settings):
    model = Classifier(**{**TINY, **settings})
    data = ImageData(train_count=24, val_count=12, batch_size=12)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model, trainer


@pytest.mark.parametrize("augment", ["none", "patches", "layer_masking"])
def test_it_trains_with_every_augmentation(augment, tmp_path, capsys):
    _, trainer = trained(tmp_path, augment=augment)
    assert ("val/accuracy_masked" in trainer.callback_metrics) == (augment == "layer_masking")
    assert "majority baseline: accuracy 0.167" in capsys.readouterr().out


def test_a_vision_transformer_trains_with_patches_and_refuses_layer_masking(tmp_path):
    trained(tmp_path, **VIT, augment="patches")
    with pytest.raises(ValueError, match="drop those of hidden patches"):
        Classifier(**VIT, num_classes=3, augment="layer_masking")


def test_masked_images_of_training_hide_patches_in_a_share_of_them():
    model = Classifier(**TINY, num_classes=3, augment_share=0.5, hidden=(0.4, 0.6), patch=4)
    torch.manual_seed(0)
    masks = model.random_masks(torch.zeros(400, 3, 32, 32))
    kept = masks.mean((1, 2, 3))
    assert 0.4 < (kept < 1).float().mean() < 0.6
    assert kept[kept < 1].mean() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(masks, masks[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3))


def test_the_forward_is_masked_and_the_checkpoint_gives_the_same(tmp_path, capsys):
    model, trainer = trained(tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    x, mask = torch.rand(2, 3, 32, 32), torch.ones(2, 1, 32, 32)
    mask[..., :16] = 0
    model.eval()
    with torch.no_grad():
        y = model(x, mask)
        assert torch.equal(y, model(torch.where(mask > 0, x, float("nan")), mask))
        again = Classifier.from_checkpoint(str(tmp_path / "last.ckpt"))
        assert torch.equal(again(x, mask), y)
    loaded = again.loaded()
    assert loaded.size == 32 and mmskip.applied(loaded.model) == []
    options = ["--limit", "12", "--fractions", "0.5", "--orders", "random", "--maskings", "black", "layer masking"]
    assert main(["masking", "--model", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "out"), *options]) == 0
    assert "12 images of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "noise"}, "augment is 'noise'; expected one of none, patches, layer_masking"),
        ({"augment_share": 2}, r"augment_share is 2; expected a number in \[0, 1\]"),
        ({"hidden": (0.5, 0.1)}, "low <= high"),
        ({"patch": 0}, "patch is 0"),
        ({"model": "resnet1"}, "timm has no model 'resnet1'"),
        ({"schedule": "step"}, "schedule is 'step'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**settings)
