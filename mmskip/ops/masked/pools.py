"""Rules of pools and of reductions over space."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmskip.ops.masked.convs import pair
from mmskip.ops.masked.state import Mask
from mmskip.ops.masked.tensor import (
    NCHW,
    MaskedTensor,
    functions_named,
    keep_border,
    mask_like,
    need,
    rule,
    unmaskable,
    unwrap,
    wrap,
    zero_hidden,
)

SMALL = 1e-8
"""Added to the kept share in a global mean, as in the paper."""


def _maps(func: Any, x: Any) -> MaskedTensor:
    need(x.ndim == 4 and x.axes == NCHW, func, "works on [B, C, H, W] activations only")
    return x


def global_mean(x: MaskedTensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """Mean over the kept positions: mean(x m) / (mean(m) + 1e-8); 0 where nothing is kept."""
    mean = zero_hidden(x).mean(dims, keepdim=True)
    share = shaped_share(x.mask, mean)
    # adding 1e-8 to 1 must give 1 in double precision too, so it guards the division only
    mean = mean / share.clamp(min=SMALL)
    return mean if keepdim else mean.squeeze(dims)


def shaped_share(mask: Mask, like: Tensor) -> Tensor:
    """Kept share of the positions, [B, 1, ...] in the number of axes of `like`."""
    return mask.share().to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


@rule(F.max_pool2d, torch.max_pool2d)
def max_pool2d(
    func: Any,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Pools the activations, zero under the mask, and the mask."""
    need(not return_indices, func, "with return_indices has no rule")
    x = _maps(func, input)
    where = (kernel_size, stride, padding, dilation, ceil_mode)
    pooled = x.mask.pooled(("max", str(where)), lambda m: F.max_pool2d(m, *where))
    return wrap(F.max_pool2d(zero_hidden(x), *where), pooled)


@rule(F.avg_pool2d)
def avg_pool2d(
    func: Any, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *args: Any, **kwargs: Any
) -> Tensor:
    """Averages the activations, zero under the mask; a position is kept where any was. A window of the full map is a
    global mean."""
    x = _maps(func, input)
    whole = tuple(x.shape[-2:]) == pair(kernel_size) and pair(padding) == (0, 0)
    return _averaged(x, func, whole, (kernel_size, stride, padding, *args), kwargs)


@rule(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def adaptive_avg_pool2d(func: Any, input: Any, output_size: Any) -> Tensor:
    """As `avg_pool2d`."""
    x = _maps(func, input)
    return _averaged(x, func, output_size in (1, (1, 1), [1, 1]), (output_size,), {})


def _averaged(x: MaskedTensor, func: Any, whole: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if whole:
        return global_mean(keep_border(x), (2, 3), True)
    after = x.mask.pooled((func.__name__, str(args), str(kwargs)), lambda m: (func(m, *args, **kwargs) > 0).to(m))
    return wrap(func(zero_hidden(x), *args, **kwargs), after)


@rule(F.adaptive_max_pool2d)
def adaptive_max_pool2d(func: Any, input: Any, output_size: Any, return_indices: bool = False) -> Tensor:
    """A pool to one position is the maximum of what is kept; others are as `max_pool2d`."""
    need(not return_indices, func, "with return_indices has no rule")
    x = keep_border(_maps(func, input))
    if output_size in (1, (1, 1), [1, 1]):
        return _extreme(torch.amax, x, (2, 3), True)
    pooled = x.mask.derive(("adaptive max", str(output_size)), lambda m: F.adaptive_max_pool2d(m, output_size))
    return wrap(F.adaptive_max_pool2d(zero_hidden(x), output_size), pooled)


def _extreme(func: Any, x: MaskedTensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """Largest or smallest kept value; 0 where nothing is kept."""
    data = unwrap(x)
    kept = mask_like(x.mask, data, x.axes) > 0
    worst = torch.finfo(data.dtype).min if func is torch.amax else torch.finfo(data.dtype).max
    found = func(torch.where(kept, data, worst), dims, keepdim=True)
    found = torch.where(kept.any(x.axes[0], keepdim=True).any(x.axes[1], keepdim=True), found, 0)
    return found if keepdim else found.squeeze(dims)


def kept_statistics(x: Tensor, m: Tensor, dims: tuple[int, ...], repeats: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the kept elements over `dims`, axes kept, in float32 at least.

    Args:
        x: activations.
        m: the mask in the layout of x, with one element for `repeats` elements of x in `dims`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, m = x.to(wide), m.to(wide)
    count = (m.sum(dims, keepdim=True) * repeats).clamp(min=SMALL)
    mean = (x * m).sum(dims, keepdim=True) / count
    var = ((x - mean).square() * m).sum(dims, keepdim=True) / count
    return mean, var, count


def _negative(x: Tensor, dim: Any) -> tuple[int, ...] | None:
    if dim is None:
        return None
    dims = dim if isinstance(dim, Sequence) else (dim,)
    return tuple(d if d < 0 else d - x.ndim for d in dims)


def _axes_after(axes: tuple[int, int], dims: tuple[int, ...], keepdim: bool) -> tuple[int, int]:
    if keepdim:
        return axes
    first, second = (a + sum(d > a for d in dims) for a in axes)
    return first, second


def reduced(func: Any, x: Any, dim: Any, keepdim: bool, over_space: Callable[..., Tensor], plain: Any) -> Any:
    """A reduction: over axes without positions the mask stays; over all positions `over_space` reduces what is kept.

    Args:
        over_space: called with (x, negative dims, keepdim).
        plain: called with (activations, dim, keepdim).
    """
    dims = _negative(x, dim)
    need(dims is not None, func, "reduces the whole batch to one number")
    assert dims is not None
    need(-x.ndim not in dims, func, "reduces over the samples of the batch")
    x = keep_border(x)
    if not set(dims) & set(x.axes):
        result = plain(unwrap(x), dim, keepdim)
        axes = _axes_after(x.axes, dims, keepdim)
        if isinstance(result, Tensor):
            return wrap(result, x.mask, axes)
        return type(result)(wrap(part, x.mask, axes) for part in result)
    need(set(x.axes) <= set(dims), func, "reduces over rows or columns alone")
    return over_space(x, dims, keepdim)


@rule(*functions_named("mean", torch, Tensor))
def mean(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Over space: the mean of what is kept."""
    return reduced(func, x, dim, keepdim, global_mean, lambda t, d, k: t.mean(d, keepdim=k, dtype=dtype))


@rule(*functions_named("sum", torch, Tensor))
def sum_(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Over space: the sum of what is kept."""

    def over_space(t: MaskedTensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        return zero_hidden(t).sum(dims, keepdim=keepdim)

    return reduced(func, x, dim, keepdim, over_space, lambda t, d, k: t.sum(d, keepdim=k, dtype=dtype))


@rule(torch.amax, Tensor.amax, torch.amin, Tensor.amin)
def extreme(func: Any, x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    """Over space: the extreme of what is kept."""
    plain = torch.amax if func.__name__ == "amax" else torch.amin
    return reduced(
        func, x, dim or None, keepdim, lambda t, d, k: _extreme(plain, t, d, k), lambda t, d, k: plain(t, d, keepdim=k)
    )


@rule(torch.max, Tensor.max, torch.min, Tensor.min)
def extreme_with_index(func: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Over channels only: over space the index would have no meaning."""
    plain = torch.max if func.__name__ == "max" else torch.min

    def over_space(*_: Any) -> Tensor:
        raise unmaskable(func, "over space returns positions; use amax")

    need(dim is None or isinstance(dim, int), func, "compares two activations; use maximum")
    return reduced(func, x, dim, keepdim, over_space, lambda t, d, k: plain(t, d, keepdim=k))


@rule(torch.var, Tensor.var, torch.std, Tensor.std)
def spread(
    func: Any, x: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None
) -> Any:
    """Over space: variance or deviation of what is kept."""
    less = int(unbiased) if correction is None else correction
    plain = torch.var if func.__name__ == "var" else torch.std

    def over_space(t: MaskedTensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        data = unwrap(t)
        times = torch.Size(data.shape[d] for d in dims if d not in t.axes).numel()
        _, var, count = kept_statistics(data, mask_like(t.mask, data, t.axes), dims, times)
        result = (var * count / (count - less).clamp(min=SMALL)).to(data.dtype)
        result = result if plain is torch.var else result.sqrt()
        return result if keepdim else result.squeeze(dims)

    return reduced(func, x, dim, keepdim, over_space, lambda t, d, k: plain(t, d, correction=less, keepdim=k))


@rule(torch.var_mean)
def var_mean(func: Any, x: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **kwargs: Any) -> Any:
    """Variance and mean of what is kept."""
    return spread(torch.var, x, dim, unbiased, keepdim, **kwargs), mean(torch.mean, x, dim, keepdim)


@rule(torch.norm, Tensor.norm, torch.linalg.vector_norm)
def norm(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Over space: the norm of what is kept (ConvNeXt V2's global response)."""
    names = ("ord", "dim", "keepdim", "dtype") if func is torch.linalg.vector_norm else ("p", "dim", "keepdim", "dtype")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    order = given.pop("ord", given.pop("p", 2))
    order = 2 if order in (None, "fro") else order
    dim, keepdim = given.pop("dim", None), given.pop("keepdim", False)
    need(not any(v is not None for v in given.values()), func, f"has no rule for {', '.join(given)}")

    def plain(t: Tensor, d: Any, k: bool) -> Tensor:
        return torch.linalg.vector_norm(t, order, d, k)

    return reduced(func, x, dim, keepdim, lambda t, d, k: plain(zero_hidden(t), d, k), plain)
