"""Rules of convolutions, explicit padding and interpolation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmskip.ops.masked.state import Mask, Window
from mmskip.ops.masked.tensor import NCHW, MaskedTensor, keep_border, need, rule, unwrap, wrap, zero_hidden


def pair(value: Any) -> tuple[int, int]:
    """(h, w) of an argument that may be one number."""
    if isinstance(value, Sequence):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def _pads(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        h, w = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
        return (w // 2, w - w // 2, h // 2, h - h // 2)
    h, w = pair(padding)
    return (w, w, h, h)


def _expect_maps(func: Any, x: Any, *weights: Any) -> None:
    need(isinstance(x, MaskedTensor), func, "was given masked activations where weights belong")
    need(x.ndim == 4 and x.axes == NCHW, func, "works on [B, C, H, W] activations only")
    need(not any(isinstance(w, MaskedTensor) for w in weights), func, "has weights that depend on the activations")


@rule(F.conv2d)
def conv2d(
    func: Any,
    input: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """The method prepares the input; the mask is that of a max pool with the same window."""
    _expect_maps(func, input, weight, bias)
    kernel, dilation = (weight.shape[2], weight.shape[3]), pair(dilation)
    window = Window(kernel, pair(stride), _pads(padding, kernel, dilation), dilation)
    return wrap(
        *_convolved(input, window, weight, bias, lambda x, b: func(x, weight, b, stride, padding, dilation, groups))
    )


def _convolved(x: Any, window: Window, weight: Tensor, bias: Tensor | None, run: Any) -> tuple[Tensor, Mask]:
    mask: Mask = x.mask
    after = mask.windowed(window)
    if window.pointwise and x.edge is None:
        return run(unwrap(x), bias), after
    if x.edge is not None and x.edge[4] != 0:
        x = keep_border(x)
        mask, after = x.mask, x.mask.windowed(window)
    rules = mask.rules
    y = run(rules.conv_input(unwrap(x), mask, window), bias)
    return rules.conv_output(y, mask, window, bias), after


@rule(F.conv_transpose2d)
def conv_transpose2d(
    func: Any, input: Any, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """As a convolution; an output is kept where anything kept reaches it."""
    _expect_maps(func, input, weight, bias)
    x = keep_border(input)
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    given = {"stride": 1, "dilation": 1, **dict(zip(names, args, strict=False)), **kwargs}
    kernel, steps = (weight.shape[2], weight.shape[3]), pair(given["stride"])
    # the inputs that one output sees: every stride-th element of the window
    seen = tuple(-(-((k - 1) * d + 1) // s) for k, d, s in zip(kernel, pair(given["dilation"]), steps, strict=True))
    one = {**given, "groups": 1}
    after = x.mask.derive(
        ("transposed", kernel, str(sorted(one.items()))),
        lambda m: (F.conv_transpose2d(m, m.new_ones(1, 1, *kernel), None, **one) > 0).to(m),
    )
    data = x.mask.rules.conv_input(unwrap(x), x.mask, Window((seen[0], seen[1])))
    return wrap(func(data, weight, bias, **given), after)


@rule(F.pad)
def pad(func: Any, input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """A constant border is outside the image; reflected and repeated borders copy the mask too."""
    pads = tuple(int(p) for p in pad)
    x: Any = input
    data = unwrap(x)
    axes = [-1 - i for i, _ in enumerate(pads[::2]) if any(pads[2 * i : 2 * i + 2])]
    if not axes:
        return wrap(data, x.mask, x.axes, x.edge)
    if not set(axes) & set(x.axes):
        need(-data.ndim not in axes, func, "adds samples to the batch")
        return wrap(func(data, pads, mode, value), x.mask, x.axes, x.edge)
    _expect_maps(func, x)
    need(set(axes) <= {-1, -2}, func, "pads channels and positions at once")
    pads = (*pads, 0, 0)[:4]
    if min(pads) < 0:
        cut = tuple(min(p, 0) for p in pads)
        x = keep_border(x)
        x = wrap(F.pad(unwrap(x), cut), x.mask.derive(("crop", cut), lambda m: F.pad(m, cut)))
        pads = tuple(max(p, 0) for p in pads)
        if not isinstance(x, MaskedTensor):
            return func(x, pads, mode, value)
    if mode != "constant":
        x = keep_border(x)
        return wrap(func(unwrap(x), pads, mode), x.mask.derive((mode, pads), lambda m: F.pad(m, pads, mode)))
    number = 0.0 if value is None else float(value)
    x = keep_border(x)
    padded = func(unwrap(x), pads, mode, number)
    return wrap(padded, x.mask.padded(pads), edge=(pads[0], pads[1], pads[2], pads[3], number))


@rule(F.interpolate)
def interpolate(func: Any, input: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Nearest copies the mask; the others average what is kept."""
    _expect_maps(func, input)
    x = keep_border(input)
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    key = ("interpolate", *sorted((k, str(v)) for k, v in kwargs.items()))
    if kwargs.get("mode", "nearest").startswith("nearest"):
        return wrap(func(unwrap(x), **kwargs), x.mask.derive(key, lambda m: func(m, **kwargs)))
    weight = x.mask.once((*key, "weight"), lambda: func(x.mask.m, **kwargs))
    after = x.mask.derive(key, lambda m: (weight > 1e-6).to(m))
    # where all neighbours are kept the weight is 1 but for rounding
    scale = x.mask.once((*key, "scale"), lambda: torch.where(weight > 1 - 1e-5, 1, 1 / weight.clamp(min=1e-6)))
    y = func(zero_hidden(x), **kwargs)
    return wrap(y * scale.to(y.dtype), after)
