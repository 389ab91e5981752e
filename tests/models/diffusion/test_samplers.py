"""Samplers against distributions whose denoiser is known in closed form."""

import math

import pytest
import torch

from mmskip.models.diffusion.samplers import SAMPLERS, ddpm_denoiser, evaluations_of, karras_sigmas, sample

MEAN, SPREAD = 0.7, 0.3


def gaussian(x, sigma):
    """The denoiser of data drawn from a normal distribution."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def exact(noise, sigma_max):
    """End of the probability-flow ODE: an affine map of the start."""
    start = noise * sigma_max
    return MEAN + (start - MEAN) * SPREAD / math.sqrt(SPREAD**2 + sigma_max**2)


@pytest.mark.parametrize(("sampler", "error"), [("euler", 0.06), ("heun", 3e-3), ("dpm++", 1e-2), ("unipc", 1e-2)])
def test_samplers_follow_the_ode_and_count_their_evaluations(sampler, error):
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (10, 40):
        images, evaluations = sample(gaussian, noise, sampler, steps)
        assert evaluations == evaluations_of(sampler, steps) == (2 * steps - 1 if sampler == "heun" else steps)
        errors.append(float((images - exact(noise, 80.0)).abs().mean()))
    assert errors[1] < error and errors[1] < errors[0] / 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_the_denoiser_itself(sampler):
    noise = torch.randn(2, 3, 4, 4)
    images, evaluations = sample(gaussian, noise, sampler, 1)
    torch.testing.assert_close(images, gaussian(noise * 80, torch.tensor([80.0, 80.0])), atol=1e-4, rtol=1e-4)
    assert evaluations == 1


def test_noise_levels_fall_from_the_largest_to_nought():
    sigmas = karras_sigmas(5, 0.002, 80.0)
    assert sigmas[0] == pytest.approx(80) and sigmas[-2] == pytest.approx(0.002) and sigmas[-1] == 0
    assert sigmas == sorted(sigmas, reverse=True)


def test_a_ddpm_network_becomes_a_denoiser():
    betas = torch.linspace(1e-4, 0.02, 1000)
    kept = torch.cumprod(1 - betas.double(), 0)

    def predict(x, t):
        sigma = ((1 - kept[t]) / kept[t]).sqrt().float()
        scaled = x * (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
        return (scaled - gaussian(scaled, sigma)) / sigma.view(-1, 1, 1, 1)

    denoise, low, high = ddpm_denoiser(predict, betas)
    assert low == pytest.approx(0.01, rel=1e-3) and high == pytest.approx(157.4, rel=1e-2)
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images, _ = sample(denoise, noise, "heun", 40, low, high)
    assert float((images - exact(noise, high)).abs().mean()) < 0.02


def test_bad_settings_are_refused():
    noise = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="sampler is 'ddim'; expected one of euler"):
        sample(gaussian, noise, "ddim")
    with pytest.raises(ValueError, match="steps is 0"):
        sample(gaussian, noise, "heun", 0)


def test_euler_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    data, steps = 0.5, 7
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=data, rho=7.0)
    scheduler.set_timesteps(steps)
    assert scheduler.sigmas.tolist() == pytest.approx(karras_sigmas(steps, 0.002, 80.0), rel=1e-5)
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    x = noise * 80
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
        x_scaled = scheduler.scale_model_input(x, t)
        assert x_scaled.shape == x.shape
        x = scheduler.step((gaussian(x, sigma.expand(4)) - skip * x) / out, t, x).prev_sample
    torch.testing.assert_close(sample(gaussian, noise, "euler", steps)[0], x, atol=1e-4, rtol=1e-4)


def test_heun_is_that_of_diffusers_with_one_evaluation_in_the_last_step():
    diffusers = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    steps = 7
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(steps)
    sigmas = torch.tensor(karras_sigmas(steps, 0.002, 80.0))
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.set_begin_index(0)
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    x = noise * 80
    assert len(scheduler.timesteps) == evaluations_of("heun", steps)
    state = x
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        state = scheduler.step(gaussian(state, sigma.expand(4)), t, state).prev_sample
    torch.testing.assert_close(sample(gaussian, noise, "heun", steps)[0], state, atol=1e-4, rtol=1e-4)
