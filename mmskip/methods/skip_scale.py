"""Scales on the skip connections of a UNet (Skip-Tuning, arXiv 2402.15170; ScaleLong's constants, arXiv 2310.13545).

Every concatenation of the decoder becomes cat(up_i, rho_i * skip_i). The normalisation that follows it sees both parts
together, so the scales cannot be folded into weights; they cost one pass over the skip's part of the concatenation.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmskip import families
from mmskip.config import MethodConfig, check_choice, check_count, check_number
from mmskip.families.base import SkipSite
from mmskip.registry import register
from mmskip.swap import Change, bind, state_of, with_first
from mmskip.utils.deprecated import warn_deprecated

SPACINGS = ("ends", "from_deepest", "to_shallowest")
SCHEDULES = ("constant", "increasing", "decreasing", "window", "auto")
TARGETS = ("both", "norm", "residual")
LEVELS = ("ddpm", "edm")
PREDICTIONS = ("epsilon", "sample")


@dataclass(frozen=True)
class SkipScaleConfig(MethodConfig):
    """Scales rho on the skip connections; give exactly one of `scale`, (`deepest`, `shallowest`) and `kappa`.

    Args:
        scale: one rho for all skips, or one per skip from the deepest to the shallowest; >= 0.
        deepest, shallowest: a linear course of rho over the k skips, by `spacing`.
        spacing: `"ends"`: both ends are reached, rho_i = deepest + i (shallowest - deepest) / (k - 1), i = 0 .. k - 1.
            The paper divides by k and does not say where it begins to count: `"from_deepest"` (i = 0 .. k - 1) or
            `"to_shallowest"` (i = 1 .. k).
        kappa: ScaleLong's constants, kappa ** depth with depth 0 at the shallowest skip; > 0.
        target: what sees the scaled skip: `"both"`, or only one path of the residual block after the concatenation:
            `"norm"` (the branch that begins with the normalisation) or `"residual"` (the shortcut). The paper's
            ablation.
        schedule: over the noise level u, from 0 (clean) to 1 (noise): `"constant"`; `"increasing"`, rho + (1 - rho) u;
            `"decreasing"`, 1 + (rho - 1) u; `"window"`, rho where sigma lies in `window`, else 1; `"auto"`, the paper's
            choice by `prediction`.
        window: least and largest sigma.
        prediction: what the network predicts: `"epsilon"` (auto: increasing) or `"sample"`, EDM's preconditioned
            networks among them (auto: decreasing).
        levels: meaning of `timestep`: `"ddpm"`: a step number 0 .. `num_timesteps` - 1, sigma by linear betas;
            `"edm"`: ln(sigma) / 4, u linear in ln(sigma) from `sigma_min` to `sigma_max`.
        num_timesteps: steps of the training schedule, >= 2.
        beta_start, beta_end: of the betas, in (0, 1); `scaled_betas`: linear in their square root (latent diffusion).
        sigma_min, sigma_max: > 0.

    Example:
        >>> SkipScaleConfig(deepest=0.6, shallowest=1.0).scales(3)
        (0.6, 0.8, 1.0)
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("skip",)

    scale: float | Sequence[float] | None = None
    deepest: float | None = None
    shallowest: float | None = None
    spacing: str = "ends"
    kappa: float | None = None
    target: str = "both"
    schedule: str = "constant"
    window: Sequence[float] | None = None
    prediction: str | None = None
    levels: str = "ddpm"
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    scaled_betas: bool = False
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        for name in ("scale", "window"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, int, float)):
                object.__setattr__(self, name, tuple(value))
        self._check_scales()
        check_choice("spacing", self.spacing, SPACINGS)
        check_choice("target", self.target, TARGETS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("levels", self.levels, LEVELS)
        check_choice("prediction", self.prediction, (None, *PREDICTIONS))
        if self.schedule == "auto" and self.prediction is None:
            raise ValueError(f"schedule is 'auto' and prediction is None; expected one of {', '.join(PREDICTIONS)}.")
        self._check_levels()

    def _check_scales(self) -> None:
        ends = (self.deepest, self.shallowest)
        given = [self.scale is not None, ends != (None, None), self.kappa is not None]
        if sum(given) != 1 or (given[1] and None in ends):
            raise ValueError(
                f"scale is {self.scale!r}, (deepest, shallowest) is {ends!r}, kappa is {self.kappa!r}; expected "
                "exactly one of the three, with both ends of a linear course."
            )
        values = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if not values:
            raise ValueError("scale is empty; expected one number >= 0 per skip.")
        named = [("scale", value) for value in values] + [("deepest", ends[0]), ("shallowest", ends[1])]
        for name, value in named:
            check_number(name, value, low=0, optional=True)
        check_number("kappa", self.kappa, low=0, open_low=True, optional=True)

    def _check_levels(self) -> None:
        check_count("num_timesteps", self.num_timesteps, low=2)
        for low, high, limit in (("beta_start", "beta_end", 1.0), ("sigma_min", "sigma_max", math.inf)):
            least, most = getattr(self, low), getattr(self, high)
            if not (_is_number(least, 0.0) and _is_number(most, 0.0) and 0 < least < most < limit):
                raise ValueError(f"({low}, {high}) is {(least, most)!r}; expected 0 < {low} < {high} < {limit}.")
        if (self.window is not None) != (self.schedule == "window"):
            raise ValueError(f"window is {self.window!r} and schedule is {self.schedule!r}; give both or neither.")
        if self.window is None:
            return
        pair = self.window if isinstance(self.window, tuple) and len(self.window) == 2 else (None, None)
        if not (_is_number(pair[0], 0.0) and _is_number(pair[1], 0.0) and pair[0] < pair[1]):  # type: ignore[operator]
            raise ValueError(f"window is {self.window!r}; expected (least sigma, largest sigma), 0 <= least < largest.")
        least, most = self.sigma_range()
        if pair[1] < least or pair[0] > most:  # type: ignore[operator]
            raise ValueError(
                f"window is {list(pair)}; the sigmas of this noise schedule go from {least:.4g} to {most:.4g}, so the "
                "window would never be entered."
            )

    def sigma_range(self) -> tuple[float, float]:
        """Least and largest sigma of the noise schedule."""
        if self.levels == "edm":
            return self.sigma_min, self.sigma_max
        sigmas = ddpm_sigmas(self)
        return float(sigmas[0]), float(sigmas[-1])

    def scales(self, count: int) -> tuple[float, ...]:
        """rho of each of `count` skips, from the deepest to the shallowest.

        Raises:
            ValueError: `scale` is a list of another length.
        """
        if self.kappa is not None:
            return tuple(self.kappa ** (count - 1 - i) for i in range(count))
        if self.deepest is not None and self.shallowest is not None:
            first, parts = {"ends": (0, max(count - 1, 1)), "from_deepest": (0, count), "to_shallowest": (1, count)}[
                self.spacing
            ]
            return tuple(self.deepest + (i + first) * (self.shallowest - self.deepest) / parts for i in range(count))
        if isinstance(self.scale, (int, float)):
            return (float(self.scale),) * count
        assert self.scale is not None
        if len(self.scale) != count:
            raise ValueError(f"scale has {len(self.scale)} values; expected {count}, one per skip from the deepest on.")
        return tuple(float(value) for value in self.scale)


def _is_number(value: Any, least: float) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and least <= value < math.inf


def ddpm_sigmas(config: SkipScaleConfig) -> Tensor:
    """sigma = sqrt((1 - abar) / abar) of each step [num_timesteps], fp64."""
    power = 0.5 if config.scaled_betas else 1.0
    ends = (config.beta_start**power, config.beta_end**power)
    betas = torch.linspace(*ends, config.num_timesteps, dtype=torch.float64) ** (1 / power)
    kept = torch.cumprod(1 - betas, 0)
    return ((1 - kept) / kept).sqrt()


@dataclass
class NoiseLevel:
    """The noise level of the current forward, shared by the root and the joints: u and sigma [B] or [1], fp32."""

    u_B: Tensor | None = field(default=None)
    sigma_B: Tensor | None = field(default=None)


@dataclass(frozen=True)
class RootState:
    """State of the root: how it reads the noise level from its arguments."""

    config: SkipScaleConfig
    level: NoiseLevel
    timestep: str
    sigmas: Tensor | None


@dataclass(frozen=True)
class JointState:
    """State of a joint: how it scales its skip."""

    config: SkipScaleConfig
    rho: float
    skip: SkipSite
    level: NoiseLevel


class LeveledRoot(nn.Module):
    """Mixin of the network: reads the noise level of each forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: RootState = state_of(self, LeveledRoot)
        value = bind(self, args, kwargs)[state.timestep]
        config = state.config
        device = next(self.parameters()).device
        t_B = torch.as_tensor(value, device=device).reshape(-1).to(torch.float32)
        if config.levels == "edm":
            log_sigma_B = 4 * t_B
            low, high = math.log(config.sigma_min), math.log(config.sigma_max)
            state.level.u_B = ((log_sigma_B - low) / (high - low)).clamp(0, 1)
            state.level.sigma_B = log_sigma_B.exp()
        else:
            assert state.sigmas is not None
            state.level.u_B = (t_B / (config.num_timesteps - 1)).clamp(0, 1)
            steps_B = t_B.round().long().clamp(0, config.num_timesteps - 1)
            state.level.sigma_B = state.sigmas.to(device)[steps_B]
        return super().forward(*args, **kwargs)


class ScaledJoint(nn.Module):
    """Mixin of the module after a concatenation: scale the skip's channels."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: JointState = state_of(self, ScaledJoint)
        return super().forward(*with_first(self, args, kwargs, lambda x: _scale(x, state)), **kwargs)


def _scale(x: Tensor, state: JointState) -> Tensor:
    skip = state.skip
    skip.check(x)
    rho = _rho(state, x)
    # inside the joint both paths read the concatenation, and a checkpointed block reads it again for its gradients
    in_place = skip.fresh and state.config.target == "both" and not torch.is_grad_enabled()
    out = x if in_place else x.clone()
    out.narrow(skip.dim, skip.start, skip.stop - skip.start).mul_(rho)
    return out


def _rho(state: JointState, x: Tensor) -> Any:
    """rho as a number, or for a schedule as a tensor that has one value per sample."""
    config, rho, schedule = state.config, state.rho, effective_schedule(state.config)
    if schedule == "constant":
        return rho
    u_B, sigma_B = state.level.u_B, state.level.sigma_B
    if u_B is None or sigma_B is None:
        raise RuntimeError("a scaled skip ran outside the network that mmskip was applied to: no noise level is known.")
    if schedule == "window":
        low, high = config.window  # type: ignore[misc]
        # sigma went through a logarithm in fp32: one that equals an end of the window may come back beside it
        inside_B = (sigma_B >= low * (1 - 1e-6)) & (sigma_B <= high * (1 + 1e-6))
        rho_B = torch.where(inside_B, rho, 1.0)
    elif schedule == "increasing":
        rho_B = rho + (1 - rho) * u_B
    else:
        rho_B = 1 + (rho - 1) * u_B
    # video networks fold the frames into the batch
    rho_B = rho_B.repeat_interleave(x.shape[0] // len(rho_B)) if len(rho_B) > 1 else rho_B
    return rho_B.reshape(-1, *[1] * (x.dim() - 1))


def effective_schedule(config: SkipScaleConfig) -> str:
    """Return the schedule, with `auto` resolved."""
    if config.schedule != "auto":
        return config.schedule
    return "increasing" if config.prediction == "epsilon" else "decreasing"


@register(SkipScaleConfig, "unet")
def skip_scale_unet(config: SkipScaleConfig, view: Any) -> list[Change]:
    """Return the changes that scale the skips of a network."""
    level = NoiseLevel()
    changes = []
    for index, (skip, rho) in enumerate(zip(view.skips, config.scales(len(view.skips)), strict=True)):
        site = f"skip.{index}"
        module = {"both": skip.joint, "norm": skip.norm, "residual": skip.shortcut}[config.target]
        if module is None:
            raise ValueError(f"{site}: {type(skip.joint).__name__} has no {config.target} path; use target='both'.")
        changes.append(Change(site, module, ScaledJoint, JointState(config, rho, skip, level), aspect="skip"))
    if effective_schedule(config) != "constant":
        if view.timestep is None:
            raise ValueError(
                f"{type(view.root).__name__} has no argument for its noise level; use schedule='constant', or name the "
                "argument in its UNetView."
            )
        sigmas = ddpm_sigmas(config).float() if config.levels == "ddpm" else None
        changes.append(Change("root", view.root, LeveledRoot, RootState(config, level, view.timestep, sigmas)))
    return changes


def measure_skip_norms(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, float]:
    """Run `model(*args, **kwargs)` and measure how large each skip is beside the decoder features it meets.

    Returns:
        Per site, from the deepest on, the mean over the batch of ||skip|| / ||up||, before any scale (the paper's
        diagnostic; .446 for EDM on ImageNet-64, .404 for its consistency model).

    Raises:
        ValueError: the model has no skip connections.
    """
    view = families.find(model, ("unet",))
    ratios: dict[str, float] = {}

    def measure(site: str, skip: SkipSite) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = arguments[0] if arguments else named[list(inspect.signature(type(module).forward).parameters)[1]]
            skip.check(x)
            ratios[site] = float(_norm_ratio(x.detach().float(), skip))

        return hook

    handles = []
    try:
        for index, skip in enumerate(view.skips):
            handles.append(skip.joint.register_forward_pre_hook(measure(f"skip.{index}", skip), with_kwargs=True))
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return ratios


def _norm_ratio(x: Tensor, skip: SkipSite) -> Tensor:
    rows = x.movedim(skip.dim, 1).flatten(2)
    part = rows[:, skip.start : skip.stop]
    own = part.square().sum((1, 2))
    up = rows.square().sum((1, 2)) - own
    return (own / up.clamp(min=1e-30)).sqrt().mean()


def skip_norms(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, float]:
    """Deprecated name of `measure_skip_norms`."""
    warn_deprecated("mmskip.skip_norms", "mmskip.methods.skip_scale.measure_skip_norms")
    return measure_skip_norms(model, *args, **kwargs)
