"""Rules of normalisation layers: statistics that mix positions are those of what is kept."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmskip.ops.masked.pools import kept_statistics
from mmskip.ops.masked.tensor import NCHW, MaskedTensor, keep_border, mask_like, need, rule, unwrap, wrap


def _kept(x: MaskedTensor) -> tuple[Tensor, Tensor]:
    data = unwrap(x)
    return data, mask_like(x.mask, data, x.axes)


@rule(F.batch_norm, torch.batch_norm)
def batch_norm(
    func: Any,
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Evaluation acts on each position alone; training takes, and tracks, the statistics of the kept positions."""
    x = keep_border(input)
    if not training:
        y = F.batch_norm(unwrap(x), running_mean, running_var, weight, bias, False, momentum, eps)
        return wrap(y, x.mask, x.axes)
    need(x.ndim == 4 and x.axes == NCHW, func, "in training works on [B, C, H, W] activations only")
    data, m = _kept(x)
    mean, var, count = kept_statistics(data, m, (0, 2, 3), 1)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = (var * count / (count - 1).clamp(min=1)).flatten()
            running_mean.lerp_(mean.flatten().to(running_mean), momentum)
            running_var.lerp_(unbiased.to(running_var), momentum)
    y = _affine((data - mean) * torch.rsqrt(var + eps), weight, bias).to(data.dtype)
    return wrap(y, x.mask, x.axes)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


@rule(F.group_norm, torch.group_norm)
def group_norm(
    func: Any, input: Any, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Statistics of each group of channels over the kept positions."""
    x = keep_border(input)
    need(x.ndim == 4 and x.axes == NCHW, func, "works on [B, C, H, W] activations only")
    data, m = _kept(x)
    b, c, h, w = data.shape
    grouped = data.reshape(b, num_groups, c // num_groups, h, w)
    mean, var, _ = kept_statistics(grouped, m[:, None], (2, 3, 4), c // num_groups)
    y = ((grouped - mean) * torch.rsqrt(var + eps)).reshape(data.shape)
    return wrap(_affine(y, weight, bias).to(data.dtype), x.mask)


@rule(F.instance_norm)
def instance_norm(
    func: Any,
    input: Any,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Statistics of each channel over the kept positions."""
    if not use_input_stats:
        return batch_norm(F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    need(running_mean is None, func, "that tracks statistics has no rule")
    return group_norm(func, input, input.shape[1], weight, bias, eps)


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    func: Any,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Over channels it acts on each position alone; over channels and space the statistics are of the kept ones."""
    x = keep_border(input)
    data, m = _kept(x)
    dims = tuple(range(-len(normalized_shape), 0))
    if not set(dims) & set(x.axes):
        return wrap(F.layer_norm(data, normalized_shape, weight, bias, eps), x.mask, x.axes)
    need(set(x.axes) <= set(dims), func, "normalises rows or columns alone")
    repeats = torch.Size(data.shape[d] for d in dims if d not in x.axes).numel()
    mean, var, _ = kept_statistics(data, m, dims, repeats)
    y = (data - mean) * torch.rsqrt(var + eps)
    y = y if weight is None else y * weight
    return wrap((y if bias is None else y + bias).to(data.dtype), x.mask, x.axes)


@rule(*([F.rms_norm] if hasattr(F, "rms_norm") else []), torch.rms_norm)
def rms_norm(
    func: Any, input: Any, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Over channels it acts on each position alone."""
    x = keep_border(input)
    need(not set(range(-len(normalized_shape), 0)) & set(x.axes), func, "over space has no rule")
    return wrap(F.rms_norm(unwrap(x), normalized_shape, weight, eps), x.mask, x.axes)


@rule(F.normalize)
def normalize(func: Any, input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
    """Over channels it acts on each position alone."""
    x = keep_border(input)
    dims = {d if d < 0 else d - x.ndim for d in ((dim,) if isinstance(dim, int) else dim)}
    need(not dims & {*x.axes, -x.ndim}, func, "over space has no rule")
    return wrap(F.normalize(unwrap(x), p, dim, eps), x.mask, x.axes)
