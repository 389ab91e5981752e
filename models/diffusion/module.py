"""A diffusion model as a LightningModule: EDM's preconditioning and loss on a UNet of diffusers (Karras et al. 2022).

Shapes: B images, C channels, H and W pixels.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmskip.config import MethodConfig
from mmskip.models.common.base import BaseModule
from mmskip.models.common.methods import apply_methods
from mmskip.models.common.optim import RANGES, check_ranges, check_schedule
from mmskip.models.diffusion.samplers import Denoiser, ImageSampler
from mmskip.utils.deprecated import warn_deprecated
from mmskip.utils.extras import require

_RANGES = RANGES | {
    "sigma_data": "(0, inf)",
    "sigma_min": "(0, inf)",
    "ema": "[0, 1)",
    "label_dropout": "[0, 1)",
}


class Diffusion(BaseModule):
    """Learns to denoise images at every noise level; samples with its averaged weights.

    The network F is preconditioned: D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4), with the loss
    (sigma^2 + sd^2) / (sigma sd)^2 ||D - clean||^2 and ln(sigma) normally distributed in training. Batches are dicts
    with `image` [B, C, H, W] in [-1, 1] and, for class conditions, `label` [B].

    Args:
        unet: settings of `diffusers.UNet2DModel`; `num_class_embeds` makes it conditional on the class.
        sigma_data: standard deviation sd of the images, > 0.
        log_sigma_mean, log_sigma_std: of ln(sigma) in training.
        sigma_min, sigma_max: noise levels where sampling ends and begins, 0 < min < max.
        label_dropout: share of the labels replaced by class `num_class_embeds - 1` in training, which then stands for
            "any class", so that samples can be guided; in [0, 1).
        ema: decay of the averaged weights per step, in [0, 1).
        lr: peak learning rate of AdamW, > 0.
        weight_decay: >= 0.
        schedule, warmup: of the learning rate, see `mmskip.models.common.optim`.
        methods: configs applied to the network in order, for training and sampling.

    Raises:
        ValueError: a setting out of range, or a network that diffusers does not build.
    """

    def __init__(
        self,
        unet: dict[str, Any],
        sigma_data: float = 0.5,
        log_sigma_mean: float = -1.2,
        log_sigma_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        label_dropout: float = 0.0,
        ema: float = 0.999,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: str = "cosine",
        warmup: float = 0.05,
        methods: list[MethodConfig] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_ranges(given, _RANGES)
        check_schedule(schedule)
        if sigma_min >= sigma_max:
            raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; expected sigma_min < sigma_max.")
        if label_dropout and not unet.get("num_class_embeds"):
            raise ValueError("label_dropout needs a network with classes: give unet.num_class_embeds.")
        super().__init__(given)
        self.unet = build_unet(unet)
        apply_methods(self.unet, self.methods)
        self.averaged = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(ema))
        self.averaged.requires_grad_(False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W of the images."""
        config: Any = self.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def classes(self) -> int | None:
        """Classes of images that can be asked for; None without class conditions."""
        known = self.hparams["unet"].get("num_class_embeds")
        return known - bool(self.hparams["label_dropout"]) if known else None

    @property
    def sampler_unet(self) -> nn.Module:
        """The averaged network: where skip scales and step caching are applied."""
        return self.averaged.module

    def denoise(self, unet: nn.Module, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        """D(x, sigma), the expected clean images [B, C, H, W]."""
        sd = self.hparams["sigma_data"]
        sigma = sigma_B.view(-1, 1, 1, 1)
        total = (sigma**2 + sd**2).sqrt()
        extra = {} if label_B is None else {"class_labels": label_B}
        prediction = unet(x_BCHW / total, sigma_B.log() / 4, **extra).sample
        return sd**2 / total**2 * x_BCHW + sigma * sd / total * prediction

    def _loss(self, unet: nn.Module, batch: dict[str, Tensor], noise: Tensor, log_sigma_B: Tensor) -> Tensor:
        sigma_B, sd, clean = log_sigma_B.exp(), self.hparams["sigma_data"], batch["image"]
        label_B = self._labels(batch, training=unet.training)
        denoised = self.denoise(unet, clean + sigma_B.view(-1, 1, 1, 1) * noise, sigma_B, label_B)
        weight_B = (sigma_B**2 + sd**2) / (sigma_B * sd) ** 2
        return (weight_B * (denoised - clean).square().mean((1, 2, 3))).mean()

    def _labels(self, batch: dict[str, Tensor], training: bool) -> Tensor | None:
        classes = self.hparams["unet"].get("num_class_embeds")
        if not classes:
            return None
        label_B, dropout = batch["label"], self.hparams["label_dropout"]
        if training and dropout:
            dropped = torch.rand(len(label_B), device=label_B.device) < dropout
            label_B = torch.where(dropped, classes - 1, label_B)
        return label_B

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The weighted denoising loss at random noise levels."""
        noise = torch.randn_like(batch["image"])
        log_sigma_B = torch.randn(len(noise), device=noise.device)
        log_sigma_B = log_sigma_B * self.hparams["log_sigma_std"] + self.hparams["log_sigma_mean"]
        loss = self._loss(self.unet, batch, noise, log_sigma_B)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(noise))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        """Average the weights once per optimizer step."""
        if self.trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self.averaged.update_parameters(self.unet)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """The loss of the averaged weights at fixed noise, the same at every validation."""
        images = batch["image"]
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(images.shape, generator=generator).to(images)
        log_sigma_B = self.validation_log_sigma(len(images)).to(images)
        loss = self._loss(self.averaged.module.eval(), batch, noise, log_sigma_B)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)

    test_step = validation_step

    def validation_log_sigma(self, count: int) -> Tensor:
        """ln(sigma) [count] of a validation batch: even quantiles of the training distribution."""
        spread = torch.linspace(0.02, 0.98, count)
        normal = torch.erfinv(2 * spread - 1) * math.sqrt(2)
        return normal * self.hparams["log_sigma_std"] + self.hparams["log_sigma_mean"]

    def image_sampler(self, guidance: float = 1.0) -> ImageSampler:
        """Return a sampler on the averaged weights; with classes, image i is of class i modulo their number.

        Args:
            guidance: weight of the class condition, >= 0; other than 1 it needs `label_dropout`, and doubles the
                evaluations (both calls count).

        Raises:
            ValueError: guidance without a class for "any".
        """
        if guidance != 1 and not self.hparams["label_dropout"]:
            raise ValueError("guidance needs a model trained with label_dropout > 0; use guidance=1.")
        unet = self.sampler_unet.eval()
        low, high = self.hparams["sigma_min"], self.hparams["sigma_max"]
        return ImageSampler(
            unet,
            lambda number_B: self._guided(unet, number_B, guidance),
            self.image_shape,
            low,
            high,
            {"levels": "edm", "prediction": "sample", "sigma_min": low, "sigma_max": high},
            calls=1 if guidance == 1 else 2,
        )

    def drawer(self, guidance: float = 1.0) -> ImageSampler:
        """Old name of `image_sampler`."""
        warn_deprecated("Diffusion.drawer", "Diffusion.image_sampler")
        return self.image_sampler(guidance)

    def generate(self, count: int, seed: int = 0, guidance: float = 1.0, **settings: Any) -> tuple[Tensor, int]:
        """Images [count, C, H, W] in [-1, 1] and the evaluations per image; see `ImageSampler.draw`."""
        return self.image_sampler(guidance).draw(count, seed, **settings)

    def _guided(self, unet: nn.Module, number_B: Tensor, guidance: float) -> Denoiser:
        if not self.classes:
            return lambda x, sigma: self.denoise(unet, x, sigma)
        label_B = number_B % self.classes
        if guidance == 1:
            return lambda x, sigma: self.denoise(unet, x, sigma, label_B)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            any_B = torch.full_like(label_B, self.hparams["unet"]["num_class_embeds"] - 1)
            with_class, without = self.denoise(
                unet, torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([label_B, any_B])
            ).chunk(2)
            return without + guidance * (with_class - without)

        return denoise

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights of the network, with weight decay."""
        return [{"params": list(self.unet.parameters()), "weight_decay": self.hparams["weight_decay"]}]


def build_unet(settings: dict[str, Any]) -> nn.Module:
    """A `diffusers.UNet2DModel`.

    Raises:
        ValueError: diffusers is not installed, or refuses the settings.
    """
    diffusers = require("diffusion", "diffusers", "a diffusion model")
    try:
        unet: Any = diffusers.UNet2DModel(**settings)
        return unet
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"diffusers.UNet2DModel refuses unet={settings!r}: {error}") from error
