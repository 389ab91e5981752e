"""The diffusion module: its loss, its averaged weights, its samples."""

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

import mmskip

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from mmskip.models.diffusion.module import Diffusion

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


def batches(count=12, size=8):
    """Images that are white on the left (class 0) or on the right (class 1)."""
    label = torch.arange(count) % 2
    image = -torch.ones(count, 1, size, size)
    image[label == 0, :, :, : size // 2] = 1
    image[label == 1, :, :, size // 2 :] = 1
    return DataLoader([{"image": i, "label": k} for i, k in zip(image, label, strict=True)], batch_size=6)


def fitted(steps, folder, **settings):
    torch.manual_seed(0)
    model = Diffusion({**UNET, **settings.pop("unet", {})}, lr=1e-2, schedule="constant", warmup=0, **settings)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, batches())
    return model, trainer


def test_the_preconditioned_network_is_right_at_both_ends():
    model = Diffusion(UNET)
    x, low, high = torch.randn(2, 1, 8, 8), torch.full((2,), 1e-4), torch.full((2,), 1e4)
    # almost no noise: the input is the answer; all noise: the answer does not follow the input
    torch.testing.assert_close(model.denoise(model.unet, x, low), x, atol=1e-3, rtol=1e-3)
    answer = model.denoise(model.unet, x * 1e4, high)
    assert answer.abs().max() < 5


def test_the_denoising_loss_falls_in_training(tmp_path):
    model, trainer = fitted(60, tmp_path, ema=0.9)
    after = trainer.validate(model, batches(), verbose=False)[0]["val/loss"]
    torch.manual_seed(0)
    before = trainer.validate(Diffusion(UNET), batches(), verbose=False)[0]["val/loss"]
    assert after < before / 2


def test_guidance_goes_beyond_the_class_condition_and_counts_both_calls():
    model = Diffusion({**UNET, "num_class_embeds": 3}, label_dropout=0.1)
    unet, x, sigma = model.sampler_unet.eval(), torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0])
    with torch.no_grad():
        own = model.denoise(unet, x, sigma, torch.tensor([0, 1]))
        either = model.denoise(unet, x, sigma, torch.tensor([2, 2]))
        found = model._guided(unet, torch.tensor([4, 5]), 3.0)(x, sigma)
        torch.testing.assert_close(found, either + 3 * (own - either), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model._guided(unet, torch.tensor([4, 5]), 1.0)(x, sigma), own)
    assert model.generate(2, steps=5)[1] == 9 and model.generate(2, steps=5, guidance=2.0)[1] == 18


def test_samples_do_not_depend_on_the_batch_size():
    model = Diffusion(UNET)
    together, _ = model.generate(5, seed=3)
    parts, _ = model.generate(5, seed=3, batch_size=2)
    tail, _ = model.generate(2, seed=3, start=3)
    torch.testing.assert_close(together, parts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[3:], tail, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, model.generate(5, seed=4)[0])


def test_averaged_weights_follow_slowly_and_resume(tmp_path):
    model, trainer = fitted(4, tmp_path, ema=0.5)
    assert int(model.averaged.n_averaged) == 4
    own, slow = model.unet.conv_in.weight, model.averaged.module.conv_in.weight
    assert not torch.equal(own, slow)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Diffusion.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.averaged.module.conv_in.weight, slow) and int(again.averaged.n_averaged) == 4
    assert torch.equal(again.generate(2)[0], model.generate(2)[0])


def test_a_skip_scale_changes_samples_and_leaves_training_alone():
    model = Diffusion(UNET)
    plain, _ = model.generate(2)
    config = mmskip.SkipScaleConfig(scale=0.5, schedule="decreasing", levels="edm")
    mmskip.apply_(model.sampler_unet, config)
    scaled, _ = model.generate(2)
    assert not torch.allclose(plain, scaled) and mmskip.applied(model.unet) == []
    mmskip.remove_(model.sampler_unet)
    assert torch.equal(model.generate(2)[0], plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": 1.0}, "ema is 1.0"),
        ({"sigma_min": 90.0}, "sigma_min < sigma_max"),
        ({"lr": 0.0}, r"lr is 0.0; expected a number in \(0, inf\)"),
        ({"label_dropout": 0.1}, "needs a network with classes"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(UNET, **settings)


def test_a_network_that_diffusers_refuses_is_reported():
    with pytest.raises(ValueError, match="refuses unet"):
        Diffusion({**UNET, "down_block_types": ("NoBlock",)})
    with pytest.raises(ValueError, match="label_dropout > 0"):
        Diffusion(UNET).generate(1, guidance=2.0)
