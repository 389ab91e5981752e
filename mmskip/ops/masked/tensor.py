"""A tensor subclass that pairs activations with a keep mask, and the table of rules it dispatches to.

What lies under the mask is left as it comes (finite, but without meaning) until an operation that mixes positions
looks at it; that operation's rule then sets it to what the masking method says. Operations that act on each position
alone therefore cost nothing extra. An operation without a rule raises.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.ops.masked.state import Mask

RULES: dict[Any, Callable[..., Any]] = {}
NCHW = (-2, -1)


class UnmaskableOperation(ValueError):
    """An operation for which layer masking has no rule."""


class MaskedTensor(Tensor):
    """Activations with the mask of the positions that exist.

    Attributes:
        mask: the mask at the resolution of the activations.
        axes: the axes of H and W, counted from the end: (-2, -1) for [B, C, H, W], (-3, -2) for [B, H, W, C]; equal
            numbers where H * W is one axis.
        edge: (left, right, top, bottom, value) of a constant border that an explicit pad put around the image; the
            mask is zero there. None: no border.
    """

    mask: Mask
    axes: tuple[int, int]
    edge: tuple[int, int, int, int, float] | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look the rule up and run it on plain tensors."""
        rule = RULES.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            if rule is None:
                raise unmaskable(func, "has no rule")
            return rule(func, *args, **(kwargs or {}))


def rule(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the rule for these torch functions. It is called as `rule(func, *args, **kwargs)` with the
    arguments of the call and must itself `unwrap` them."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for func in funcs:
            RULES[func] = function
        return function

    return add


def functions_named(names: str, *places: Any) -> list[Any]:
    """Return the functions of these names, and their in-place twins, in torch, torch.nn.functional and torch.Tensor."""
    where = places or (torch, torch.nn.functional, Tensor)
    return [
        getattr(place, name)
        for word in names.split()
        for name in (word, f"{word}_")
        for place in where
        if callable(getattr(place, name, None))
    ]


def wrap(
    data: Tensor, mask: Mask, axes: tuple[int, int] = NCHW, edge: tuple[int, int, int, int, float] | None = None
) -> Tensor:
    """Pair activations and mask. Where all is kept, the plain activations are returned: there is nothing to do."""
    if mask.full:
        return data
    out = data.as_subclass(MaskedTensor)
    out.mask, out.axes, out.edge = mask, axes, edge
    return out


def unwrap(x: Any) -> Any:
    """Return the activations without their mask; anything else as it is."""
    return x.as_subclass(Tensor) if isinstance(x, MaskedTensor) else x


def mask_like(mask: Mask, x: Tensor, axes: tuple[int, int]) -> Tensor:
    """Return the mask in the dtype and layout of activations `x` with H and W at `axes`, one channel."""
    m = mask.to(x.dtype)
    if axes == NCHW and x.ndim == 4:
        return m
    shape = [1] * x.ndim
    shape[0] = m.shape[0]
    if axes[0] == axes[1]:
        shape[axes[0]] = m.shape[-2] * m.shape[-1]
    else:
        shape[axes[0]], shape[axes[1]] = m.shape[-2:]
    return m.reshape(shape)


def zero_hidden(x: MaskedTensor) -> Tensor:
    """Return the plain activations, zero under the mask (in a border: its value)."""
    data = unwrap(x)
    if x.edge is None or x.edge[4] == 0:
        m = mask_like(x.mask, data, x.axes)
        return data.mul_(m) if may_overwrite(data) else data * m
    return torch.where(mask_like(x.mask, data, x.axes) > 0, data, _edge_value(x, data))


def may_overwrite(x: Tensor) -> bool:
    """Whether what x holds under its mask may be overwritten: no autograd graph can hold it, and no element shares
    its memory with another."""
    return x.is_inference() and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))


def _edge_value(x: MaskedTensor, data: Tensor) -> Tensor:
    assert x.edge is not None
    left, right, top, bottom, value = x.edge
    inner = data.new_zeros(1, 1, data.shape[-2] - top - bottom, data.shape[-1] - left - right)
    return nn.functional.pad(inner, (left, right, top, bottom), value=value)


def keep_border(x: MaskedTensor) -> MaskedTensor:
    """Return the same activations with a border that counts as kept: what stands there is the same in every image."""
    if x.edge is None:
        return x
    base, pads = x.mask.base, x.mask.pads
    assert base is not None
    kept = base.derive(("kept border", pads), lambda m: nn.functional.pad(m, pads, value=1.0))
    out: Any = wrap(unwrap(x), kept, x.axes)
    return out


def need(condition: bool, func: Any, why: str) -> None:
    """Raise `unmaskable` unless the condition holds."""
    if not condition:
        raise unmaskable(func, why)


def unmaskable(func: Any, why: str) -> UnmaskableOperation:
    """Return the error of an operation that cannot be masked; it names the innermost module under way."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = f"attribute {func.__self__.__name__}"
    return UnmaskableOperation(
        f"layer masking: {name} {why} (in {_modules_under_way()}). Rules exist for convolutions, pools, norms, "
        "activations, adds, concats, channel attention and interpolation of [B, C, H, W] activations; see "
        "docs/layer_masking.md for the networks that cannot be masked."
    )


def _modules_under_way() -> str:
    """Return the innermost module on the call stack, by its name in the outermost one."""
    found: list[nn.Module] = []
    frame: Any = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found.append(owner)
        frame = frame.f_back
    if not found:
        return "no module"
    names = {id(module): name for name, module in found[-1].named_modules()}
    name = names.get(id(found[0]), "")
    return f"module {name!r}, {type(found[0]).__name__}" if name else f"module {type(found[0]).__name__}"
