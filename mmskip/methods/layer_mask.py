"""Layer masking for CNNs (Balasubramanian & Feizi, ICCV 2023): removed pixels do not exist for any layer.

A mask m (1 = keep) travels with the activations x. A convolution with kernel k, stride s and padding p gives

    y = conv(neighbour_pad(x m)) m',    m' = maxpool(k, s, p)(m),

where a round of neighbour padding, with K a 3 x 3 box of ones, is

    x <- x + (1 - m) (K x) / (K m + 1e-5),    m <- clip(m + K m, 0, 1).

Means over space are taken over what is kept. Shapes: B samples, C channels, H and W positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmskip import families
from mmskip.config import MethodConfig, check_choice, check_count
from mmskip.ops.masked.fills import fill_hidden
from mmskip.ops.masked.root import KeepMask, active, mask_changes
from mmskip.ops.masked.state import Mask, Window
from mmskip.registry import applied, register
from mmskip.swap import Change, check_swappable, swap, unswap

PADDINGS = ("neighbour", "none", "partial")
ADDS = ("and", "or")
CONCATS = ("auto", "majority", "and", "or")


@dataclass(frozen=True)
class LayerMaskConfig(MethodConfig):
    """Layer masking.

    Args:
        padding: what a convolution sees where nothing is kept: `"neighbour"` (the mean of the nearest kept neighbours:
            the paper's), `"none"` (zero), or `"partial"` (zero, with the output scaled by window / kept part of it:
            partial convolution).
        iterations: rounds of neighbour padding, >= 0; None: as many as the window reaches, (k - 1) * dilation, after
            which no further round changes a kept output.
        add: which positions a sum of two activations keeps: `"and"` (both: the paper's) or `"or"`.
        concat: the same for concats: `"majority"` (more than half of the joined tensors), `"and"`, `"or"`, or `"auto"`:
            majority, and `"or"` in a SqueezeNet, as in the paper.
        soft: accept masks with values between 0 and 1: a position of weight w is w parts itself and 1 - w parts what
            its neighbours say. False: masks hold 0 and 1 only.
        fill_gradient: gradients flow through the values filled in; False: those are constants.

    Example:
        >>> import mmskip, timm, torch
        >>> model = timm.create_model("resnet18", num_classes=4).eval()
        >>> mask = torch.ones(32, 32)
        >>> mask[:, :16] = 0  # the left half does not exist
        >>> with torch.no_grad(), mmskip.masked(model, mask, mmskip.LayerMaskConfig()):
        ...     logits = model(torch.rand(1, 3, 32, 32))
        >>> tuple(logits.shape)
        (1, 4)
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("mask",)

    padding: str = "neighbour"
    iterations: int | None = None
    add: str = "and"
    concat: str = "auto"
    soft: bool = False
    fill_gradient: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("padding", PADDINGS), ("add", ADDS), ("concat", CONCATS)):
            check_choice(name, getattr(self, name), choices)
        for name in ("soft", "fill_gradient"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected true or false.")
        if self.iterations is not None:
            check_count("iterations", self.iterations)


@dataclass(frozen=True)
class LayerMaskRules:
    """The mathematics of a config: what convolutions see and which positions a merge keeps."""

    config: LayerMaskConfig
    concat: str

    def conv_input(self, x: Tensor, mask: Mask, window: Window) -> Tensor:
        """x m, with the neighbours' mean where m = 0 under neighbour padding. [B, C, H, W]."""
        if not window.reach:
            return x
        steps = window.reach if self.config.iterations is None else self.config.iterations
        steps = steps if self.config.padding == "neighbour" else 0
        return fill_hidden(x, mask, steps, window.reach, not self.config.soft, self.config.fill_gradient)

    def conv_output(self, y: Tensor, mask: Mask, window: Window, bias: Tensor | None) -> Tensor:
        """Partial convolution's scale; the output of the other paddings stays as it is. [B, C', H', W']."""
        if self.config.padding != "partial" or not window.reach:
            return y
        scale = mask.once(("partial", window), lambda: _partial_scale(mask, window)).to(y.dtype)
        if bias is None:
            return y * scale
        shift = bias.reshape(1, -1, 1, 1)
        # where all of the window is kept the scale is 1 and the output must not be rounded again
        return torch.where(scale == 1, y, (y - shift) * scale + shift)

    def merge(self, masks: Sequence[Tensor], operation: str) -> Tensor:
        """Return the mask of a sum (`add`) or a concat (`cat`)."""
        how = self.config.add if operation == "add" else self.concat
        if how == "majority":
            mean = torch.stack(list(masks)).mean(0)
            return torch.where(mean > 0.5, mean if self.config.soft else 1.0, 0.0)
        merged = masks[0]
        for m in masks[1:]:
            merged = merged * m if how == "and" else torch.maximum(merged, m)
        return merged


def _partial_scale(mask: Mask, window: Window) -> Tensor:
    inside = torch.ones_like(mask.m) if mask.base is None else F.pad(torch.ones_like(mask.base.m), mask.pads)
    ones = mask.m.new_ones(1, 1, *window.kernel)
    seen, size = (
        F.conv2d(F.pad(m, window.padding), ones, stride=window.stride, dilation=window.dilation)
        for m in (mask.m, inside)
    )
    return torch.where(seen > 0, size / (seen + 1e-8), 0)


def _rules(config: LayerMaskConfig, view: Any) -> LayerMaskRules:
    concat = config.concat
    if concat == "auto":
        concat = "or" if view.joins_parallel_branches else "majority"
    return LayerMaskRules(config, concat)


@register(LayerMaskConfig, "cnn")
def layer_mask_cnn(config: LayerMaskConfig, view: Any) -> list[Change]:
    """Return the changes by which a CNN obeys `masked`."""
    return mask_changes(view.root, _rules(config, view))


@contextmanager
def masked(model: nn.Module, mask: Tensor, config: LayerMaskConfig | None = None) -> Iterator[nn.Module]:
    """Hide pixels from a CNN: `with mmskip.masked(model, mask): y = model(x)`.

    Inside, calls of `model` (and of its `forward_features` and `forward_intermediates`) depend on kept pixels only;
    feature maps come back with zeros where nothing is kept. An image of which nothing is kept gives what the head
    makes of all-zero features, not NaN. A mask of ones is the plain model, at no cost. Calls in other threads are not
    masked.

    Args:
        model: a CNN of timm or torchvision, or any other built of the same operations.
        mask: 1 or True = keep; [B, 1, H, W], [B, H, W] or [H, W] with B that of the images or 1; bool, integer or
            floating point; of any resolution: a coarser one is scaled up by its nearest value, of a finer one a pixel
            is kept where half of its area is.
        config: None: that of `apply_`, or the paper's.

    Raises:
        ValueError: a mask of wrong shape, dtype or range, or on another device than the images; a model that is no
            CNN or has an operation that cannot be masked (`mmskip.ops.masked.UnmaskableOperation`, which names it).
        RuntimeError: nothing was called inside, so nothing was masked.
    """
    if config is not None and not isinstance(config, LayerMaskConfig):
        raise ValueError(f"config is {config!r}; expected a LayerMaskConfig, or None.")
    view = families.find(model, ["cnn"])
    present = [c for c in applied(model) if isinstance(c, LayerMaskConfig)]
    if present and config not in (None, present[0]):
        raise ValueError(f"config is {config!r}, but the model carries {present[0]!r}; remove_ that first.")
    settings = config or (present[0] if present else LayerMaskConfig())
    keep = KeepMask(check_mask(mask, settings.soft), settings.soft)
    changes = [] if present else mask_changes(view.root, _rules(settings, view))
    for change in changes:
        check_swappable(change.module, change.site)
        swap(change)
    token = active.set((*active.get(), (model, keep)))
    try:
        yield model
    finally:
        active.reset(token)
        for change in changes:
            unswap(change.module)
    if not keep.calls:
        raise RuntimeError(
            f"no call of this {type(model).__name__} ran inside `masked`, so nothing was masked. Call the very module "
            "given to `masked`, in the same thread."
        )


def check_mask(mask: Any, soft: bool) -> Tensor:
    """Return the mask as floating point [B, 1, H, W].

    Raises:
        ValueError: no tensor, or one of wrong shape, dtype or range.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask is {type(mask).__name__}; expected a torch.Tensor, 1 or True where pixels are kept.")
    if mask.ndim not in (2, 3, 4) or (mask.ndim == 4 and mask.shape[1] != 1) or not mask.numel():
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; expected [B, 1, H, W], [B, H, W] or [H, W]: one value for all "
            "channels of a pixel."
        )
    if mask.dtype.is_complex:
        raise ValueError(f"mask has dtype {mask.dtype}; expected bool, an integer or a floating point type.")
    m = mask.float()
    values = m.detach()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"mask has values from {float(values.min()):g} to {float(values.max()):g}; expected 0 (hidden) to 1 (kept)."
        )
    if not soft and bool(((values != 0) & (values != 1)).any()):
        raise ValueError(
            "mask has values between 0 and 1; expected 0 and 1 only, or LayerMaskConfig(soft=True) for a soft mask."
        )
    return m.reshape(-1, 1, *m.shape[-2:])
