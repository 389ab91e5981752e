"""Family `cnn`: convolutional networks of timm and torchvision, and others built of the same operations.

A CNN has one site, `input.mask`: the place where its image meets the keep mask that is active.
"""

import functools
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from mmskip.families.base import View
from mmskip.ops.masked import Mask, MaskedTensor, MaskRules, wrap
from mmskip.ops.masked.tensor import settled, zeroed
from mmskip.swap import Change, state_of

_ENTRIES = ("forward_features", "forward_intermediates")
_ATTENTION = ("qkv", "q_proj", "to_qkv", "in_proj_weight", "relative_position_bias_table")


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
        """The mask of these images.

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
        """The forward of the model, masked if a mask is active."""
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
        result = tree_map_only(MaskedTensor, lambda x: zeroed(settled(x)), result)
        if layout == torch.preserve_format:
            return result
        return tree_map_only(Tensor, lambda x: x.contiguous(memory_format=layout), result)


class _AnyLayout(TorchFunctionMode):
    """Networks may ask for views that only the layout of their own image has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.view and not any(isinstance(a, torch.dtype) for a in args[1:]):
            func = Tensor.reshape
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class CNNView(View):
    """A convolutional network.

    Attributes:
        root: the module whose input is an image.
    """

    family: str
    root: nn.Module

    @property
    def stacks(self) -> dict[str, tuple[nn.Module, ...]]:  # type: ignore[override]
        """None: its sites are convolutions and norms."""
        return {}

    @property
    def joins_parallel_branches(self) -> bool:
        """Whether concats join the two windows of SqueezeNet's fire modules."""
        return any(type(module).__name__ == "Fire" for module in self.root.modules())

    def mask_changes(self, rules: MaskRules) -> list[Change]:
        """The change by which the network looks for a mask at every call."""
        base: Any = type(self.root)
        return [Change("input.mask", self.root, root_mixin(base), rules)]


def match(model: nn.Module) -> tuple[CNNView | None, str]:
    """The view of `model`, or None and the reason why it does not fit."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        return (
            None,
            f"needs the network as Python runs it; {name} is scripted or traced, so its operations are not seen",
        )
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convs:
        return None, f"needs a network with 2-d convolutions; {name} has none"
    attention = _attention(model.modules())
    if attention is not None:
        return None, (
            f"{name} holds {type(attention).__name__}, attention between positions. A transformer can leave tokens out "
            "for real: drop those of hidden patches after the patch embedding, or give its attention a mask"
        )
    mixers = [m for m in convs if max(m.kernel_size) > 1 and m.kernel_size != m.stride]
    if not mixers:
        return None, f"{name} has no convolution that looks at neighbours, so it is no convolutional network"
    return CNNView("cnn", model), ""


def _attention(modules: Any) -> nn.Module | None:
    for module in modules:
        if isinstance(module, nn.MultiheadAttention) or any(
            hasattr(module, name) and not isinstance(module, nn.Conv2d) for name in _ATTENTION
        ):
            return module
    return None
