"""Rules of operations that move or join channels and positions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmskip.ops.masked.state import Mask, Window, merge_masks
from mmskip.ops.masked.tensor import (
    NCHW,
    MaskedTensor,
    functions_named,
    keep_border,
    mask_like,
    need,
    rule,
    unwrap,
    wrap,
    zero_hidden,
)


def _sizes(args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], Sequence) else tuple(args)


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(func: Any, tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> Tensor:
    """Along channels; the merge rule decides which positions exist."""
    return _joined(func, tensors, kwargs.get("axis", dim), 0)


@rule(torch.stack)
def stack(func: Any, tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """Along a new axis beside the channels."""
    return _joined(func, tensors, dim, 1)


def _joined(func: Any, tensors: Sequence[Any], dim: int, added: int) -> Tensor:
    masked = [keep_border(x) for x in tensors if isinstance(x, MaskedTensor)]
    like = masked[0]
    axis = dim if dim < 0 else dim - like.ndim - added
    axes = like.axes if not added else tuple(a - (axis >= a) for a in like.axes)
    need(axis not in axes and axis != -like.ndim - added, func, "joins along positions or samples")
    need(
        all(x.axes == like.axes and x.mask.size == like.mask.size for x in masked),
        func,
        "joins activations of different positions",
    )
    full = like.mask.once("all kept", lambda: Mask(torch.ones_like(like.mask.m), like.mask.rules, True))
    votes = [keep_border(x).mask if isinstance(x, MaskedTensor) else full for x in tensors]
    mask = merge_masks(votes, "cat")
    parts = []
    for x, own in zip(tensors, votes, strict=True):
        data = unwrap(x)
        parts.append(data if own.covers(mask) else data * mask_like(own, data, like.axes))
    return wrap(func(parts, dim), mask, (axes[0], axes[1]))


@rule(torch.permute, Tensor.permute)
def permute(func: Any, x: Any, *dims: Any) -> Tensor:
    """Moves the axes of the positions."""
    order = [d if d >= 0 else d + x.ndim for d in _sizes(dims)]
    x = keep_border(x)
    need(order[0] == 0, func, "moves the samples of the batch")
    axes = tuple(order.index(a + x.ndim) - x.ndim for a in x.axes)
    need(axes[0] <= axes[1], func, "swaps rows and columns")
    return wrap(unwrap(x).permute(order), x.mask, (axes[0], axes[1]))


@rule(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes)
def transpose(func: Any, x: Any, dim0: int, dim1: int) -> Tensor:
    """As `permute`."""
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(func, x, order)


@rule(torch.reshape, Tensor.reshape, Tensor.view, Tensor.unflatten, torch.unflatten)
def reshape(func: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Channels may be split and joined and positions put into one axis; all of them in one axis with the channels is
    what a head does: see `flatten`."""
    x = keep_border(x)
    size = kwargs.get("shape", kwargs.get("size"))
    data = unwrap(x)
    result = func(data, *args, **kwargs) if size is None or args else func(data, size)
    if result.ndim == 2 and x.ndim == 4 and x.axes == NCHW and result.shape[0] == x.shape[0]:
        return flattened(x)
    need(result.dtype == data.dtype and result.shape[0] == x.shape[0], func, "regroups the samples of the batch")
    return wrap(result, x.mask, _moved_axes(func, x, result))


def _moved_axes(func: Any, x: MaskedTensor, result: Tensor) -> tuple[int, int]:
    """Where the positions are after a reshape: found by the axes before them, which must stay intact."""
    h, w = x.mask.size
    before = torch.Size(x.shape[: x.axes[0] + x.ndim]).numel()
    merged = x.axes[0] == x.axes[1]
    need(merged or x.axes[1] == x.axes[0] + 1, func, "regroups positions with channels between them")
    seen = 1
    for i, length in enumerate(result.shape):
        if seen == before:
            rest = result.shape[i:]
            if rest[:2] == (h, w):
                return i - result.ndim, i + 1 - result.ndim
            if length == h * w:
                return i - result.ndim, i - result.ndim
        seen *= length
    need(False, func, f"regroups positions: {tuple(x.shape)} to {tuple(result.shape)}")
    raise AssertionError


def flattened(x: MaskedTensor) -> Tensor:
    """[B, C * H * W] for a linear head. Such a head is a convolution with a window of the full map, so the method
    prepares its input alike; nothing is masked afterwards."""
    h, w = x.mask.size
    data = x.mask.rules.conv_input(zero_hidden(x), x.mask, Window((h, w)))
    y = data.flatten(1)
    share = x.mask.rules.conv_output(torch.ones_like(y[:, :, None, None]), x.mask, Window((h, w)), None)
    return y * share.flatten(1)


@rule(torch.flatten, Tensor.flatten)
def flatten(func: Any, x: Any, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Positions into one axis, or everything for a head."""
    start, end = (d if d >= 0 else d + x.ndim for d in (start_dim, end_dim))
    shape = (*x.shape[:start], -1, *x.shape[end + 1 :])
    return reshape(Tensor.reshape, x, shape)


@rule(torch.unsqueeze, Tensor.unsqueeze)
def unsqueeze(func: Any, x: Any, dim: int) -> Tensor:
    """A new axis beside the channels."""
    x = keep_border(x)
    axis = dim if dim < 0 else dim - x.ndim - 1
    need(axis != -x.ndim - 1, func, "adds an axis before the samples")
    axes = tuple(a - (axis >= a) for a in x.axes)
    return wrap(unwrap(x).unsqueeze(dim), x.mask, (axes[0], axes[1]))


@rule(torch.squeeze, Tensor.squeeze)
def squeeze(func: Any, x: Any, dim: Any = None) -> Tensor:
    """An axis beside the channels is taken away."""
    x = keep_border(x)
    dims = {d if d < 0 else d - x.ndim for d in ((dim,) if isinstance(dim, int) else dim or (0,))}
    need(not dims & {*x.axes, -x.ndim}, func, "could take away positions or samples")
    need(len(dims) == 1, func, "of several axes has no rule")
    result = unwrap(x).squeeze(dim)
    axes = tuple(a + sum(d > a for d in dims) * (x.ndim - result.ndim) for a in x.axes)
    return wrap(result, x.mask, (axes[0], axes[1]))


@rule(*functions_named("split chunk tensor_split split_with_sizes unbind unsafe_chunk unsafe_split", torch, Tensor))
def split(func: Any, x: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Along channels, or an axis beside them."""
    x = keep_border(x)
    whole = "unbind" in func.__name__
    dim = kwargs.get("dim", args[0 if whole else 1] if len(args) > (0 if whole else 1) else 0)
    axis = dim if dim < 0 else dim - x.ndim
    need(axis not in {*x.axes, -x.ndim}, func, "splits positions or samples")
    axes = tuple(a + (whole and axis > a) for a in x.axes)
    return tuple(wrap(part, x.mask, (axes[0], axes[1])) for part in func(unwrap(x), *args, **kwargs))


@rule(torch.narrow, Tensor.narrow)
def narrow(func: Any, x: Any, dim: int, start: int, length: int) -> Tensor:
    """As indexing by a slice."""
    return getitem(Tensor.__getitem__, x, (*[slice(None)] * (dim % x.ndim), slice(start, start + length)))


@rule(Tensor.__getitem__)
def getitem(func: Any, x: Any, index: Any) -> Tensor:
    """Slices of channels and of positions."""
    x = keep_border(x)
    given = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [g for g in given if not isinstance(g, Tensor)]:
        at = next(i for i, g in enumerate(given) if g is Ellipsis)
        given[at : at + 1] = [slice(None)] * (x.ndim - sum(g is not None for g in given) + 1)
    given += [slice(None)] * (x.ndim - sum(g is not None for g in given))
    need(all(g is None or isinstance(g, (slice, int)) for g in given), func, "by a tensor has no rule")
    need(given[0] == slice(None), func, "chooses samples of the batch")
    spots = [i for i, g in enumerate(given) if g is not None]
    chosen = {axis: given[spots[axis + x.ndim]] for axis in x.axes}
    need(all(isinstance(g, slice) for g in chosen.values()), func, "takes one row or column")
    result = unwrap(x)[tuple(given)]
    mask = x.mask
    if any(g != slice(None) for g in chosen.values()):
        need(x.axes[0] != x.axes[1], func, "chooses positions of a flattened map")
        rows, columns = (chosen[axis] for axis in x.axes)
        mask = mask.derive(("slice", str(rows), str(columns)), lambda m: m[:, :, rows, columns])
    axes = []
    for axis in x.axes:
        after = given[spots[axis + x.ndim] + 1 :]
        axes.append(-1 - sum(not isinstance(g, int) for g in after))
    return wrap(result, mask, (axes[0], axes[1]))


@rule(F.pixel_shuffle, F.pixel_unshuffle, F.unfold, F.fold, torch.roll, Tensor.roll, torch.einsum)
def mixing(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Raise a clearer error than that of an unknown operation."""
    need(False, func, "mixes positions in a way that one mask for all channels cannot follow")
    raise AssertionError


@rule(F.channel_shuffle, torch.channel_shuffle)
def channel_shuffle(func: Any, input: Any, groups: int) -> Tensor:
    """Moves channels."""
    x = keep_border(input)
    return wrap(func(unwrap(x), groups), x.mask, x.axes)


@rule(Tensor.expand, Tensor.expand_as, torch.broadcast_to)
def expand(func: Any, x: Any, *args: Any) -> Tensor:
    """Channels may be repeated; a plain tensor may take the shape of masked activations."""
    if not isinstance(x, MaskedTensor):
        return func(x, *(unwrap(a) for a in args))
    x = keep_border(x)
    result = func(unwrap(x), *(unwrap(a) for a in args))
    need(
        result.ndim == x.ndim and all(result.shape[a] == x.shape[a] for a in (*x.axes, -x.ndim)),
        func,
        "repeats positions or samples",
    )
    return wrap(result, x.mask, x.axes)
