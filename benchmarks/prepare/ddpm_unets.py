"""Two trained DDPM networks that belong to no library, made known to mmskip.

The weights stand in ../shared/data/diffusion (MIT, github.com/BrianPulfer/PapersReimplementations): noise prediction on
28 x 28 grey images, 1000 steps, linear betas, three skip connections. What a custom network needs is
`describe_unet` and a function that returns a `ImageSampler`:

    python evaluate.py fid --checkpoint benchmarks/prepare/ddpm_unets.py:mnist --features runs/mnist_features --nfe 9 \\
        --real ../shared/data/mnist/mnist_test_first6667.npz
    python -m mmskip.search skip --checkpoint benchmarks/prepare/ddpm_unets.py:fashion \\
        --features runs/fashion_features ...

Shapes: B images, C channels, H and W pixels, D features of a time step.
"""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmskip.families.unet import SkipSite, UNetView, describe_unet
from mmskip.models.diffusion.samplers import ImageSampler, ddpm_denoiser

DATA = Path(os.environ.get("MMSKIP_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


class Block(nn.Module):
    """Layer norm over channels and pixels (not in the last block of all), and two convolutions."""

    def __init__(self, shape: tuple[int, int, int], width: int, normalise: bool = True) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(shape)
        self.conv1 = nn.Conv2d(shape[0], width, 3, 1, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.normalise = normalise

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, width, H, W]."""
        x = self.ln(x_BCHW) if self.normalise else x_BCHW
        return F.silu(self.conv2(F.silu(self.conv1(x))))


def _stage(size: int, inputs: int, widths: tuple[int, int, int], last: bool = False) -> nn.Sequential:
    shapes = [(c, size, size) for c in (inputs, *widths[:2])]
    return nn.Sequential(
        *(Block(s, w, not (last and i == 2)) for i, (s, w) in enumerate(zip(shapes, widths, strict=True)))
    )


def _time(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(100, width), nn.SiLU(), nn.Linear(width, width))


class DdpmUNet(nn.Module):
    """The network; its keys are those of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Embedding(1000, 100)
        self.te1, self.te2, self.te3 = _time(1), _time(10), _time(20)
        self.te_mid, self.te4, self.te5, self.te_out = _time(40), _time(80), _time(40), _time(20)
        self.b1, self.b2, self.b3 = (
            _stage(28, 1, (10, 10, 10)),
            _stage(14, 10, (20, 20, 20)),
            _stage(7, 20, (40, 40, 40)),
        )
        self.b_mid = _stage(3, 40, (20, 20, 40))
        self.b4, self.b5 = _stage(7, 80, (40, 20, 20)), _stage(14, 40, (20, 10, 10))
        self.b_out = _stage(28, 20, (10, 10, 10), last=True)
        self.down1, self.down2 = nn.Conv2d(10, 10, 4, 2, 1), nn.Conv2d(20, 20, 4, 2, 1)
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1))
        self.up1 = nn.Sequential(nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2))
        self.up2, self.up3 = nn.ConvTranspose2d(20, 20, 4, 2, 1), nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.conv_out = nn.Conv2d(10, 1, 3, 1, 1)
        # the concatenations pass through separate modules, because time is added before the next stage sees them
        self.join1, self.join2, self.join3 = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x_BCHW: Tensor, t: Tensor) -> Tensor:
        """Noise [B, 1, 28, 28] in x at steps t [B], 0 .. 999."""
        time_BD = self.time_embed(t)

        def at(embed: nn.Sequential) -> Tensor:
            return embed(time_BD)[:, :, None, None]

        out1 = self.b1(x_BCHW + at(self.te1))
        out2 = self.b2(self.down1(out1) + at(self.te2))
        out3 = self.b3(self.down2(out2) + at(self.te3))
        middle = self.b_mid(self.down3(out3) + at(self.te_mid))
        out4 = self.b4(self.join1(torch.cat([out3, self.up1(middle)], 1)) + at(self.te4))
        out5 = self.b5(self.join2(torch.cat([out2, self.up2(out4)], 1)) + at(self.te5))
        out = self.b_out(self.join3(torch.cat([out1, self.up3(out5)], 1)) + at(self.te_out))
        return self.conv_out(out)


@describe_unet(DdpmUNet)
def _(unet: DdpmUNet) -> UNetView:
    # the encoder's half comes first in every concatenation
    joins = ((unet.join1, 40), (unet.join2, 20), (unet.join3, 10))
    skips = (SkipSite(join, 0, width, 2 * width, stage=stage) for stage, (join, width) in enumerate(joins))
    return UNetView(unet, tuple(skips), timestep="t")


def _sampler(name: str) -> ImageSampler:
    path = DATA / "diffusion" / f"ddpm_{name}_unet.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is no file; set MMSKIP_SHARED_DATA to the folder that holds diffusion/{path.name}.")
    unet = DdpmUNet()
    unet.load_state_dict(load_file(str(path)))
    unet.eval()
    denoise, low, high = ddpm_denoiser(unet, torch.linspace(1e-4, 0.02, 1000))
    levels = {"levels": "ddpm", "prediction": "epsilon"}
    # the layer norms hide the mean of an image from the network; without the clamp it drifts, and noise is left over
    return ImageSampler(
        unet, lambda number_B: lambda x, s: denoise(x, s).clamp(-1, 1), (1, 28, 28), low, high, levels, stretched
    )


def stretched(x_BCHW: Tensor) -> Tensor:
    """Each image stretched to [-1, 1]: backgrounds come out at different greys."""
    low, high = x_BCHW.amin((1, 2, 3), keepdim=True), x_BCHW.amax((1, 2, 3), keepdim=True)
    return 2 * (x_BCHW - low) / (high - low).clamp(min=1e-6) - 1


def mnist() -> ImageSampler:
    """Digits."""
    return _sampler("mnist")


def fashion() -> ImageSampler:
    """Clothes."""
    return _sampler("fashion")
