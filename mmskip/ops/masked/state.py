"""The keep mask at one resolution, and what is computed from it once for all layers there.

Shapes: B samples, C channels, H and W positions of one resolution. A mask has one channel, so its arithmetic costs
next to nothing beside that of the activations.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
"""Added to the number of kept neighbours, as in the paper."""

LARGEST = 6e4
"""Largest weight of a sum of neighbours: just below what half precision holds."""


@dataclass(frozen=True)
class Window:
    """The window of a convolution, in positions; padding is (left, right, top, bottom)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def reach(self) -> int:
        """How many positions the farthest element of a window is from another, at most."""
        return max((k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def pointwise(self) -> bool:
        """Whether each output sees one position and nothing is padded."""
        return self.kernel == (1, 1) and not any(self.padding)


class MaskRules(Protocol):
    """Protocol of a masking method: how convolutions and merges treat masks."""

    def conv_input(self, x: Tensor, mask: "Mask", window: Window) -> Tensor:
        """Return the activations [B, C, H, W] that a convolution is to see; positions under the mask hold anything."""

    def conv_output(self, y: Tensor, mask: "Mask", window: Window, bias: Tensor | None) -> Tensor:
        """Adjust the output [B, C', H', W'] of the convolution over the input mask `mask`; return it."""

    def merge(self, masks: Sequence[Tensor], operation: str) -> Tensor:
        """One mask from those [B, 1, H, W] of the operands of an `add` or a `cat`."""


class Mask:
    """A keep mask at one resolution.

    Args:
        m_B1HW: floating point in [0, 1]; 1 = kept.
        rules: of the method that masks.
        full: whether all is kept; None: found out when asked for (on a GPU that waits for the device, once).

    Attributes:
        base, pads: the mask without the border around it, and the border (left, right, top, bottom); see `padded`.
    """

    def __init__(self, m_B1HW: Tensor, rules: MaskRules, full: bool | None = None) -> None:
        self.m = m_B1HW
        self.rules = rules
        self.base: Mask | None = None
        self.pads: tuple[int, ...] = ()
        self._full = full
        self._made: dict[Any, Any] = {}

    @property
    def full(self) -> bool:
        """Whether every position of every sample is kept."""
        if self._full is None:
            # a mask that asks for gradients must stay in the graph
            self._full = not self.m.requires_grad and bool(self.m.min() >= 1)
        return self._full

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.m.shape[-2], self.m.shape[-1]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, computed at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return the mask [B, 1, H, W] in a dtype."""
        return self.once(("to", dtype), lambda: self.m.to(dtype))

    def share(self) -> Tensor:
        """Kept share [B, 1, 1, 1] of the positions, at least the smallest that is not 0."""
        return self.once("share", lambda: self.m.mean((2, 3), keepdim=True))

    def derive(self, key: Any, make: Callable[[Tensor], Tensor]) -> "Mask":
        """Return the mask that an operation named by `key` makes of this one."""
        return self.once(key, lambda: Mask(make(self.m), self.rules, True if self._full else None))

    def windowed(self, window: Window) -> "Mask":
        """Where a window sees anything kept, or nothing but padding."""
        return self.pooled(window, lambda m: _any_kept(m, window))

    def pooled(self, key: Any, pool: Callable[[Tensor], Tensor]) -> "Mask":
        """The mask after a pool: where the pooled mask is not zero. Where the pool sees nothing but the border around
        the image, it holds the same for every image, so that is kept too."""

        def seen(m: Tensor) -> Tensor:
            after = pool(m)
            if self.base is None:
                return after
            inside = pool(F.pad(torch.ones_like(self.base.m[:1]), self.pads))
            return torch.maximum(after, (inside == 0).to(m))

        return self.derive(key, seen)

    def padded(self, pads: tuple[int, ...]) -> "Mask":
        """With a border of zeros (left, right, top, bottom) that is outside the image: nothing is filled in there."""

        def make() -> Mask:
            border = Mask(F.pad(self.m, pads), self.rules, False)
            border.base, border.pads = self, pads
            return border

        return self.once(("border", pads), make)

    def fills(self, steps: int, dtype: torch.dtype) -> list[Tensor]:
        """Weights [B, 1, H, W] of the rounds of neighbour padding: (1 - m) / (K * m + eps), with K a 3 x 3 box and m
        growing by one position per round. Fewer than `steps` where nothing is left to fill."""
        base = self.base
        if base is not None:
            return self.once(("fills", steps, dtype), lambda: [F.pad(w, self.pads) for w in base.fills(steps, dtype)])
        return self.once(("fills", steps, dtype), lambda: [w.to(dtype) for w in self._fill_weights(steps)])

    def _fill_weights(self, steps: int) -> list[Tensor]:
        weights, now = [], self
        for _ in range(steps):
            if now.full:
                break
            seen = box_sum(now.m)
            # where nothing is in sight the sum is 0 and the weight of no matter, but half precision has no 1e5
            weights.append(((1 - now.m) / (seen + EPS)).clamp(max=LARGEST))
            now = Mask((now.m + seen).clamp(max=1), self.rules)
        return weights

    def covers(self, other: "Mask") -> bool:
        """Return whether all that `other` keeps is kept here too."""
        if self is other or self.full:
            return True
        # the other mask is held with the answer, so that its id stays taken
        return self.once(("covers", id(other)), lambda: (bool((self.m >= other.m).all()), other))[0]


def box_sum(x: Tensor) -> Tensor:
    """Return the sum over each 3 x 3 neighbourhood of [B, C, H, W], zeros outside."""
    if x.device.type != "cpu":
        return F.avg_pool2d(x, 3, 1, 1, divisor_override=1)
    # many times faster than a pool or a convolution on a CPU
    x = F.pad(x, (1, 1, 1, 1))
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    return rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]


def merge_masks(masks: Sequence[Mask], operation: str) -> Mask:
    """Return the mask of an `add` or a `cat` of activations with these masks."""
    first = masks[0]
    if all(mask is first for mask in masks):
        return first

    def make() -> tuple[Mask, Sequence[Mask]]:
        joined = Mask(first.rules.merge([mask.m for mask in masks], operation), first.rules)
        # the same object for the same mask, so that what is known of it is not computed again; the masks are held
        # with it, so that their ids stay taken
        same = [] if joined.m.requires_grad else [mask for mask in masks if torch.equal(mask.m, joined.m)]
        return (same or [joined])[0], masks

    return first.once((operation, *(id(mask) for mask in masks)), make)[0]


def _any_kept(m: Tensor, window: Window) -> Tensor:
    if window.pointwise:
        return m[..., :: window.stride[0], :: window.stride[1]]
    left, right, top, bottom = window.padding
    seen = _largest(F.pad(m, window.padding), window)
    (kh, kw), (dh, dw) = window.kernel, window.dilation
    if max(left, right) <= (kw - 1) * dw and max(top, bottom) <= (kh - 1) * dh:
        return seen
    # a window of padding alone holds the same in every image, so it is kept
    return torch.maximum(seen, 1 - _largest(F.pad(torch.ones_like(m[:1]), window.padding), window))


def _largest(m: Tensor, window: Window) -> Tensor:
    """Max pool without padding, rows and columns one after the other; several times faster on a CPU than a pool."""
    for axis, kernel, stride, dilation in zip((2, 3), window.kernel, window.stride, window.dilation, strict=True):
        count = (m.shape[axis] - (kernel - 1) * dilation - 1) // stride + 1
        places = torch.arange(count, device=m.device) * stride
        parts = [m.index_select(axis, places + i * dilation) for i in range(kernel)]
        m = functools.reduce(torch.maximum, parts)
    return m
