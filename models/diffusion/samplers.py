"""Samplers of diffusion models, with exact counts of function evaluations.

All work on a denoiser D(x, sigma), the expected clean image given x = clean + sigma * noise (Karras et al. 2022,
"Elucidating the design space of diffusion-based generative models"). Networks trained in another way are brought into
this form by `ddpm_denoiser`.

Shapes: B images, C channels, H and W pixels.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.utils.deprecated import renamed_names

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""D(x [B, C, H, W], sigma [B]) -> [B, C, H, W]"""


class Counted:
    """A denoiser that counts its calls.

    Attributes:
        evaluations: calls so far (NFE).
    """

    def __init__(self, denoise: Denoiser) -> None:
        self.denoise, self.evaluations = denoise, 0

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        self.evaluations += 1
        return self.denoise(x_BCHW, torch.full((len(x_BCHW),), sigma, device=x_BCHW.device))


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """The noise levels of `steps` steps from `sigma_max` down to `sigma_min`, and 0 (Karras et al. 2022, eq. 5)."""
    top, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = [(top + i / max(steps - 1, 1) * (low - top)) ** rho for i in range(steps)]
    return [*levels, 0.0]


def _euler(denoise: Counted, x: Tensor, sigmas: list[float]) -> Tensor:
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * (x - denoise(x, sigma)) / sigma
    return x


def _heun(denoise: Counted, x: Tensor, sigmas: list[float]) -> Tensor:
    for sigma, following in itertools.pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


def _dpm(denoise: Counted, x: Tensor, sigmas: list[float]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022), in variance-exploding form."""
    before: Tensor | None = None
    previous = math.inf
    for sigma, following in itertools.pairwise(sigmas):
        clean = denoise(x, sigma)
        if following == 0:
            return clean
        guess, step = clean, math.log(sigma / following)
        if before is not None:
            ratio = math.log(previous / sigma) / step
            guess = (1 + 1 / (2 * ratio)) * clean - before / (2 * ratio)
        x = following / sigma * x - math.expm1(-step) * guess
        before, previous = clean, sigma
    return x


def _unipc(denoise: Counted, x: Tensor, sigmas: list[float]) -> Tensor:
    """UniPC of second order, by diffusers, in its variance-preserving form x / sqrt(1 + sigma^2)."""
    from diffusers import UniPCMultistepScheduler

    scheduler: Any = UniPCMultistepScheduler(prediction_type="sample", use_karras_sigmas=True)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = torch.arange(len(sigmas) - 1, 0, -1)
    scheduler.set_begin_index(0)
    x = x / math.sqrt(1 + sigmas[0] ** 2)
    for step, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        clean = denoise(x * math.sqrt(1 + sigma**2), sigma)
        x = scheduler.step(clean, step, x).prev_sample
    return x


_SOLVERS = {"euler": _euler, "heun": _heun, "dpm++": _dpm, "unipc": _unipc}
SAMPLERS = tuple(_SOLVERS)


def evaluations_of(sampler: str, steps: int) -> int:
    """Function evaluations (NFE) of one sample."""
    return 2 * steps - 1 if sampler == "heun" else steps


def steps_of(sampler: str, evaluations: int) -> int:
    """Steps of a sampler that make so many function evaluations.

    Raises:
        ValueError: an unknown sampler, or a number it cannot make.
    """
    if sampler not in _SOLVERS:
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}.")
    steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
    if steps < 1 or evaluations_of(sampler, steps) != evaluations:
        raise ValueError(
            f"{sampler} cannot make {evaluations} function evaluations; expected "
            + ("an odd number >= 1 (two a step, one in the last)." if sampler == "heun" else "a number >= 1.")
        )
    return steps


@torch.no_grad()
def sample(
    denoise: Denoiser,
    noise_BCHW: Tensor,
    sampler: str = "heun",
    steps: int = 5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> tuple[Tensor, int]:
    """Draw images by the probability-flow ODE.

    Args:
        denoise: D(x, sigma).
        noise_BCHW: standard normal.
        sampler: `euler`, `heun` (second order, 2 evaluations a step but for the last), `dpm++` (2M) or `unipc`.
        steps: >= 1.
        sigma_min, sigma_max, rho: of `karras_sigmas`.

    Returns:
        Images [B, C, H, W] and the number of function evaluations made.

    Raises:
        ValueError: an unknown sampler, or no steps.
    """
    if sampler not in _SOLVERS:
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected an integer >= 1.")
    counted = Counted(denoise)
    sigmas = karras_sigmas(steps, sigma_min, sigma_max, rho)
    images = _SOLVERS[sampler](counted, noise_BCHW * sigmas[0], sigmas)
    return images, counted.evaluations


def starting_noise(shape: Sequence[int], seed: int, numbers: Sequence[int]) -> Tensor:
    """Standard normal [B, *shape], each image's from its own number, so that no batch size changes it."""
    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + n)) for n in numbers]
    )


@dataclass(frozen=True)
class ImageSampler:
    """A trained diffusion network and all that is needed to draw images with it, whatever it was trained by.

    Attributes:
        unet: the network to which methods are applied.
        denoiser: from the numbers [B] of the images, which may determine their classes, to their D(x, sigma).
        image_shape: C, H, W.
        sigma_min, sigma_max: noise levels where sampling ends and begins.
        levels: settings of `mmskip.SkipScaleConfig` on how the network receives its noise level and what it
            predicts, for schedules over the noise level.
        finish: brings drawn images into [-1, 1].
        calls: evaluations of the network per call of D (2 with guidance).
    """

    unet: nn.Module
    denoiser: Callable[[Tensor], Denoiser]
    image_shape: tuple[int, int, int]
    sigma_min: float
    sigma_max: float
    levels: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[Tensor], Tensor] = lambda x: x.clamp(-1, 1)
    calls: int = 1

    @torch.no_grad()
    def draw(
        self, count: int, seed: int = 0, sampler: str = "heun", steps: int = 5, batch_size: int = 250, start: int = 0
    ) -> tuple[Tensor, int]:
        """Images, the same for equal seeds whatever the batch size.

        Args:
            count: images.
            seed: of the noise.
            sampler, steps: see `sample`.
            batch_size: images at a time.
            start: number of the first image.

        Returns:
            Images [count, C, H, W] on the CPU, in [-1, 1], and the network's evaluations per image.
        """
        device = next(self.unet.parameters()).device
        images, evaluations = [], 0
        for first in range(start, start + count, batch_size):
            numbers = list(range(first, min(first + batch_size, start + count)))
            noise = starting_noise(self.image_shape, seed, numbers).to(device)
            denoise = self.denoiser(torch.tensor(numbers, device=device))
            drawn, evaluations = sample(denoise, noise, sampler, steps, self.sigma_min, self.sigma_max)
            images.append(self.finish(drawn).cpu())
        return torch.cat(images), evaluations * self.calls


def ddpm_denoiser(predict: Callable[[Tensor, Tensor], Tensor], betas: Tensor) -> tuple[Denoiser, float, float]:
    """The denoiser of a network that predicts the noise at step t of a DDPM.

    Args:
        predict: eps(x_t [B, C, H, W], t [B]) -> [B, C, H, W], t integer.
        betas: of the training schedule, [T].

    Returns:
        D(x, sigma), which takes the step whose sigma is nearest, and the least and largest sigma.
    """
    kept = torch.cumprod(1 - betas.double(), 0)
    sigmas_T = ((1 - kept) / kept).sqrt()
    logs_T = sigmas_T.log()

    def denoise(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        logs = logs_T.to(sigma_B.device)
        steps_B = (sigma_B.double().log()[:, None] - logs).abs().argmin(1)
        wide = sigma_B.view(-1, *[1] * (x_BCHW.dim() - 1)).to(x_BCHW.dtype)
        return x_BCHW - wide * predict(x_BCHW / (1 + wide**2).sqrt(), steps_B)

    return denoise, float(sigmas_T[0]), float(sigmas_T[-1])


__getattr__ = renamed_names(__name__, Drawer="ImageSampler")
