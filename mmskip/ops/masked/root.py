"""The way into a network under a keep mask: pairs the image with the mask that is active, and gives plain tensors back.

Shapes: B samples, C channels, H and W positions.
"""

import functools
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from mmskip.ops.masked.state import Mask, MaskRules
from mmskip.ops.masked.tensor import MaskedTensor, keep_border, wrap, zero_hidden
from mmskip.swap import Change, state_of

_ENTRIES = ("forward_features", "forward_intermediates")


class KeepMask:
    """A user's mask, at the size of every image it has met.

    Args:
        m_B1HW: float [B or 1, 1, H, W] in [0, 1], of any resolution.
        soft: values between 0 and 1 mean something.
    """

    def __init__(self, m_B1HW: Tensor, soft: bool) -> None:
        self.m = m_B1HW
        self.soft = soft
        self.calls = 0
        self._fitted: dict[Any, Mask] = {}

    def fit(self, x_BCHW: Tensor, rules: MaskRules) -> Mask:
        """Return the mask of these images.

        Raises:
            ValueError: another device or number of samples.
        """
        if x_BCHW.device != self.m.device:
            raise ValueError(
                f"the images are on {x_BCHW.device} and the mask on {self.m.device}; move the mask by .to(...)."
            )
        if self.m.shape[0] not in (1, x_BCHW.shape[0]):
            raise ValueError(
                f"the mask has {self.m.shape[0]} samples and the batch {x_BCHW.shape[0]}; expected one mask per image, "
                "or one for all."
            )
        # a mask in the autograd graph is fitted anew, so that two backward passes do not share a graph
        if self.m.requires_grad:
            return Mask(self._resized(x_BCHW), rules)
        # what is made in inference mode cannot serve a backward pass later
        inference = torch.is_inference_mode_enabled()
        key = (tuple(x_BCHW.shape[-2:]), x_BCHW.shape[0], x_BCHW.dtype == torch.float64, rules, inference)
        if key not in self._fitted:
            self._fitted[key] = Mask(self._resized(x_BCHW), rules)
        return self._fitted[key]

    def _resized(self, x_BCHW: Tensor) -> Tensor:
        (h, w), size = self.m.shape[-2:], x_BCHW.shape[-2:]
        m = self.m.double() if x_BCHW.dtype == torch.float64 else self.m
        if (h, w) != tuple(size):
            if h > size[0] or w > size[1]:
                m = nn.functional.adaptive_avg_pool2d(m, (min(h, size[0]), min(w, size[1])))
                m = m if self.soft else (m >= 0.5).to(m)
            m = nn.functional.interpolate(m, size, mode="nearest-exact")
        return m.expand(x_BCHW.shape[0], -1, -1, -1)


active: ContextVar[tuple[tuple[nn.Module, KeepMask], ...]] = ContextVar("mmskip_masks", default=())


class MaskedRoot:
    """Pairs the image with the active mask before the forward, and gives plain tensors back after it."""

    # not traced: a compiled forward must look at every call whether a mask is active
    @torch.compiler.disable(recursive=False)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the forward of the model, masked if a mask is active."""
        return enter(self, super().forward, args, kwargs)  # type: ignore[misc]


@functools.cache
def root_mixin(base: type) -> type:
    """`MaskedRoot` with the further ways into a model of class `base`."""

    def entry(name: str) -> Any:
        @torch.compiler.disable(recursive=False)
        @functools.wraps(getattr(base, name))
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return enter(self, getattr(super(mixin, self), name), args, kwargs)

        return call

    entries = {name: entry(name) for name in _ENTRIES if hasattr(base, name)}
    forward = MaskedRoot.__dict__["forward"]
    mixin = type("MaskedRoot", (MaskedRoot,), {"forward": forward, **entries})
    return mixin


def enter(root: nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of the model under the mask that is active for it."""
    keep = next((mask for module, mask in reversed(active.get()) if module is root), None)
    if keep is None or any(isinstance(v, MaskedTensor) for v in (*args, *kwargs.values())):
        return call(*args, **kwargs)
    images = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 4 and v.is_floating_point()]
    if len(images) != 1:
        given = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        raise ValueError(
            f"a masked {type(root).__name__} was called with tensors of shape {given}; expected one floating point "
            "batch of images [B, C, H, W]."
        )
    image = images[0]
    mask = keep.fit(image, state_of(root, MaskedRoot))
    keep.calls += 1
    if mask.full:
        return call(*args, **kwargs)
    # what the mask hides may hold anything, NaN too; no value of it goes further
    start = wrap(torch.where(mask.m > 0, image, 0), mask)
    args = tuple(start if v is image else v for v in args)
    plain = torch.contiguous_format if image.is_contiguous() else torch.preserve_format
    return _run(call, args, {k: start if v is image else v for k, v in kwargs.items()}, plain)


@torch.compiler.disable
def _run(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layout: torch.memory_format) -> Any:
    with _AnyLayout():
        result = call(*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        result = tree_map_only(MaskedTensor, lambda x: zero_hidden(keep_border(x)), result)
        if layout == torch.preserve_format:
            return result
        return tree_map_only(Tensor, lambda x: x.contiguous(memory_format=layout), result)


class _AnyLayout(TorchFunctionMode):
    """Networks may ask for views that only the layout of their own image has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.view and not any(isinstance(a, torch.dtype) for a in args[1:]):
            func = Tensor.reshape
        return func(*args, **(kwargs or {}))


def mask_changes(root: nn.Module, rules: MaskRules) -> list[Change]:
    """Return the change by which a network looks for a mask at every call."""
    base: Any = type(root)
    return [Change("input.mask", root, root_mixin(base), rules, aspect="mask")]
