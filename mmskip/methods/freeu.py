"""FreeU (arXiv 2309.11497): stronger decoder features, weaker low frequencies of the skips, in the deep stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmskip.config import MethodConfig, check_number
from mmskip.families.base import SkipSite
from mmskip.registry import register
from mmskip.swap import Change, state_of, with_first


@dataclass(frozen=True)
class FreeUConfig(MethodConfig):
    """FreeU's two dials, one value per decoder stage from the deepest on.

    Args:
        b: factors of the first half of the decoder features' channels; >= 0 (1: unchanged).
        s: factors of the lowest frequencies of the skip, the centre 2 x 2 of its spectrum; >= 0 (1: unchanged).
        content_dependent: each pixel's factor is (b - 1) h + 1, with h in [0, 1] the features' mean over channels,
            min-max normalised per sample; otherwise b everywhere.

    Example:
        >>> FreeUConfig(b=(1.4,), s=(0.9,)).to_dict()
        {'b': [1.4], 's': [0.9], 'content_dependent': True}
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("backbone", "skip")

    b: Sequence[float] = (1.5, 1.6)
    s: Sequence[float] = (0.9, 0.2)
    content_dependent: bool = True

    def __post_init__(self) -> None:
        for name in ("b", "s"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise ValueError(f"{name} is {value!r}; expected numbers >= 0, one per stage.")
            value = tuple(value)
            object.__setattr__(self, name, value)
            for index, factor in enumerate(value):
                check_number(f"{name}[{index}]", factor, low=0)
        if not self.b or len(self.b) != len(self.s):
            raise ValueError(f"b has {len(self.b)} values and s has {len(self.s)}; expected one each per stage.")


@dataclass(frozen=True)
class PartState:
    """One of the two dials at one joint."""

    skip: SkipSite
    factor: float
    content_dependent: bool


class FreeUBackbone(nn.Module):
    """Mixin of the module after a concatenation: amplify the decoder features."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: PartState = state_of(self, FreeUBackbone)
        return super().forward(*with_first(self, args, kwargs, lambda x: _amplify(x, state)), **kwargs)


class FreeUSkip(nn.Module):
    """Mixin of the module after a concatenation: damp the low frequencies of the skip."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: PartState = state_of(self, FreeUSkip)
        return super().forward(*with_first(self, args, kwargs, lambda x: _smooth(x, state)), **kwargs)


def _amplify(x_BCHW: Tensor, state: PartState) -> Tensor:
    skip = state.skip
    skip.check(x_BCHW)
    out = x_BCHW.clone()
    first, width = (0, skip.start) if skip.start else (skip.stop, skip.channels - skip.stop)
    factor = _content(x_BCHW.narrow(1, first, width), state.factor) if state.content_dependent else state.factor
    out.narrow(1, first, width // 2).mul_(factor)
    return out


def _smooth(x_BCHW: Tensor, state: PartState) -> Tensor:
    skip = state.skip
    skip.check(x_BCHW)
    out, width = x_BCHW.clone(), skip.stop - skip.start
    out.narrow(1, skip.start, width).copy_(scale_low_frequencies(x_BCHW.narrow(1, skip.start, width), state.factor))
    return out


def _content(up_BCHW: Tensor, b: float) -> Tensor:
    mean_B1HW = up_BCHW.float().mean(1, keepdim=True)
    low, high = mean_B1HW.amin((2, 3), keepdim=True), mean_B1HW.amax((2, 3), keepdim=True)
    return (b - 1) * (mean_B1HW - low) / (high - low).clamp(min=1e-12) + 1


def scale_low_frequencies(x_BCHW: Tensor, s: float, radius: int = 1) -> Tensor:
    """Multiply the centre 2 `radius` x 2 `radius` of each channel's centred spectrum by `s`; same shape and dtype."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x_BCHW.float(), dim=(-2, -1)), dim=(-2, -1))
    row, column = x_BCHW.shape[-2] // 2, x_BCHW.shape[-1] // 2
    rows = slice(max(row - radius, 0), row + radius)
    columns = slice(max(column - radius, 0), column + radius)
    factor = torch.ones(x_BCHW.shape[-2:], device=x_BCHW.device)
    factor[rows, columns] = s
    back = torch.fft.ifftn(torch.fft.ifftshift(spectrum * factor, dim=(-2, -1)), dim=(-2, -1))
    return back.real.to(x_BCHW.dtype)


@register(FreeUConfig, "unet")
def freeu_unet(config: FreeUConfig, view: Any) -> list[Change]:
    """Return the changes that put FreeU on the deep stages of a network."""
    stages = 1 + max(skip.stage for skip in view.skips)
    if len(config.b) > stages:
        raise ValueError(
            f"b and s have {len(config.b)} values; {type(view.root).__name__} has {stages} decoder stages."
        )
    changes = []
    for index, skip in enumerate(view.skips):
        if skip.stage >= len(config.b):
            continue
        if skip.dim != 1:
            raise ValueError(f"skip.{index} carries tokens; FreeU needs feature maps [B, C, H, W].")
        b, s = float(config.b[skip.stage]), float(config.s[skip.stage])
        if b != 1:
            state = PartState(skip, b, config.content_dependent)
            changes.append(Change(f"skip.{index}", skip.joint, FreeUBackbone, state, aspect="backbone"))
        if s != 1:
            # with s = 1 the skip stays free for a scale
            changes.append(Change(f"skip.{index}", skip.joint, FreeUSkip, PartState(skip, s, False), aspect="skip"))
    if not changes:
        raise ValueError("b and s are all 1; that changes nothing.")
    return changes
