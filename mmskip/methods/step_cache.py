"""DeepCache (arXiv 2312.00858): reuse the deep features of a UNet between the steps of a sampler.

Between two full steps only the outermost stages run; the stages below them return what they returned at the last full
step, so that the skips of the outer stages stay fresh and the deep features are stale by at most `interval` - 1 steps.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmskip.composition import Applied
from mmskip.config import MethodConfig, check_count
from mmskip.recording import Work, recorder
from mmskip.registry import register
from mmskip.reporting import MethodReport, register_report
from mmskip.swap import Change, around, bind, state_of

# a guided solver of second order makes four calls at one timestep; more are trajectories of one step each
_MOST_LANES = 4


@dataclass(frozen=True)
class StepCacheConfig(MethodConfig):
    """DeepCache: reuse deep features between sampling steps. For inference only.

    Args:
        interval: every `interval`-th step of a trajectory runs in full, >= 1 (1: all, exact).
        depth: outermost stages of encoder and decoder that run at every step, >= 1.

    Example:
        >>> StepCacheConfig(interval=2).to_dict()
        {'interval': 2, 'depth': 1}
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("steps",)

    interval: int = 3
    depth: int = 1

    def __post_init__(self) -> None:
        for name in ("interval", "depth"):
            check_count(name, getattr(self, name), low=1)


@dataclass
class Trajectory:
    """Where a sampler is, shared by the root and the stages.

    A *lane* is the number of a call among the calls at one timestep: classifier-free guidance may call twice per step,
    and solvers of second order and PNDM repeat timesteps. Every lane has separate features, so that the branches of
    guidance never mix; a lane seen for the first time runs in full.
    """

    interval: int
    timestep: float | None = None
    step: int = 0
    lane: int = 0
    shape: tuple[Any, ...] | None = None
    filled: set[int] = field(default_factory=set)
    full: bool = True
    full_steps: int = 0
    calls: int = 0

    def begin(self, timestep: float, shape: tuple[Any, ...]) -> None:
        """Decide whether the call that starts runs in full."""
        if self.timestep is None or timestep > self.timestep or shape != self.shape:
            self.reset()
        elif timestep == self.timestep and self.lane < _MOST_LANES - 1:
            self.lane += 1
        elif timestep == self.timestep:
            self.reset()
        else:
            self.step, self.lane = self.step + 1, 0
        self.timestep, self.shape = timestep, shape
        self.full = self.step % self.interval == 0 or self.lane not in self.filled
        self.filled.add(self.lane)
        self.calls += 1
        self.full_steps += self.full

    def reset(self) -> None:
        """Forget the features: a new trajectory begins."""
        self.step = self.lane = 0
        self.filled.clear()


@dataclass(frozen=True)
class StageState:
    """A deep stage and what it returned, by lane."""

    trajectory: Trajectory
    outputs: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheRootState:
    """State of the root: the trajectory, and which argument holds the timestep."""

    trajectory: Trajectory
    timestep: str


class CachedRoot(nn.Module):
    """Mixin of the network: follows the sampler."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: CacheRootState = state_of(self, CachedRoot)
        if torch.is_grad_enabled() and self.training:
            raise RuntimeError("StepCacheConfig reuses features between sampling steps; remove_ it before training.")
        bound = bind(self, args, kwargs)
        times = torch.as_tensor(bound[state.timestep]).reshape(-1)
        low, high = (float(value) for value in torch.stack([times.min(), times.max()]).tolist())
        if low != high:
            raise ValueError(
                f"the samples of one call are at different timesteps ({low} to {high}); step caching follows one "
                "trajectory per call."
            )
        sample = next(v for v in bound.values() if isinstance(v, Tensor) and v.dim() > 2)
        state.trajectory.begin(low, (*sample.shape, sample.dtype, sample.device))
        return super().forward(*args, **kwargs)


class CachedStage(nn.Module):
    """Mixin of a deep stage: runs at full steps, else returns what it returned then."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: StageState = state_of(self, CachedStage)
        lane = state.trajectory.lane
        if state.trajectory.full:
            if state.trajectory.step == 0 and lane == 0:
                state.outputs.clear()
            state.outputs[lane] = super().forward(*args, **kwargs)
        elif (recording := recorder()) is not None:
            recording.block(self, Work(reused=True))
        return state.outputs[lane]


@dataclass(frozen=True)
class StepCacheReport(MethodReport):
    """How many calls ran in full.

    Attributes:
        calls: forwards since `apply_`.
        full_calls: those of them that ran every stage.
        stages: names of the stages that the other calls took from the cache.
    """

    calls: int
    full_calls: int
    stages: tuple[str, ...]

    def __str__(self) -> str:
        if not self.calls:
            return "the network did not run since apply_"
        return f"{self.full_calls} of {self.calls} calls ran in full; the others reused {', '.join(self.stages)}"


@register_report(StepCacheConfig)
def step_report(record: Applied, model: nn.Module) -> StepCacheReport:
    """Return the report of one StepCacheConfig."""
    deep = [claim for claim in record.claims if isinstance(claim.module, CachedStage)]
    trajectory: Trajectory = state_of(deep[0].module, CachedStage).trajectory
    return StepCacheReport(trajectory.calls, trajectory.full_steps, tuple(claim.site for claim in deep))


@register(StepCacheConfig, "unet")
def step_cache_unet(config: StepCacheConfig, view: Any) -> list[Change]:
    """Return the changes by which a network reuses its deep features."""
    name = type(view.root).__name__
    if view.timestep is None or not view.decoder:
        raise ValueError(f"{name} is not made of encoder and decoder stages with a timestep; step caching needs them.")
    deepest = min(len(view.encoder), len(view.decoder)) - 1
    if config.depth > deepest:
        raise ValueError(
            f"depth is {config.depth}; {name} has {deepest + 1} stages, so at most {deepest} can be outer."
        )
    trajectory = Trajectory(config.interval)
    deep = [*view.encoder[config.depth :], view.middle, *view.decoder[: len(view.decoder) - config.depth]]
    changes = [
        around(site, CachedStage, StageState(trajectory), aspect="steps")
        for site in view.sites("stage")
        if any(site.module is stage for stage in deep)
    ]
    changes.append(Change("root", view.root, CachedRoot, CacheRootState(trajectory, view.timestep), aspect="steps"))
    return changes
