"""Rules of operations that act on each position alone: the mask stays; of two masks, the merge rule decides."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmskip.ops.masked.state import Mask, merge_masks
from mmskip.ops.masked.tensor import (
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

UNARY = """
relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus softsign
logsigmoid threshold rrelu prelu abs neg exp log log1p sqrt rsqrt square reciprocal sin cos erf sign floor ceil round
clamp clamp_min clamp_max nan_to_num tanhshrink hardshrink softshrink dropout alpha_dropout feature_dropout dropout2d
isnan isfinite
"""
BINARY = """
add sub subtract mul multiply div divide true_divide pow maximum minimum lerp addcmul addcdiv where eq ne lt le gt ge
atan2 fmod remainder rsub logical_and logical_or logical_not bitwise_and
"""
DUNDER = """
__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__
__div__ __rdiv__ __idiv__ __pow__ __rpow__ __ipow__ __neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
__and__ __or__ __invert__
"""
COPIES = "to float half bfloat16 double clone detach contiguous type_as requires_grad cpu cuda type"
ATTRIBUTES = """
shape ndim dtype device layout requires_grad is_leaf grad_fn grad is_cuda is_cpu is_meta is_sparse is_quantized
is_mkldnn is_nested is_xla is_mps itemsize nbytes names output_nr _version is_xpu is_mtia is_ipu is_hpu is_sparse_csr
"""
QUESTIONS = """
size dim ndimension numel nelement is_floating_point is_complex is_contiguous stride element_size get_device
__len__ register_hook retain_grad storage_offset is_inference is_signed
"""
EMPTY = """
new_empty new_zeros new_ones new_full new_tensor zeros_like ones_like empty_like rand_like randn_like full_like
"""

_GRAD: Any = Tensor.grad
_REQUIRES_GRAD: Any = Tensor.requires_grad


def _same_place(func: Any, like: MaskedTensor, result: Tensor) -> None:
    h, w = like.mask.size
    spans = [result.shape[a] for a in dict.fromkeys(like.axes)] if result.ndim >= -min(like.axes) else []
    need(
        result.ndim == like.ndim and spans == ([h * w] if like.axes[0] == like.axes[1] else [h, w]),
        func,
        f"changed the positions from {tuple(like.shape)} to {tuple(result.shape)}",
    )


def _finish(func: Any, args: tuple[Any, ...], result: Any, mask: Mask, axes: tuple[int, int]) -> Any:
    """Wrap a result; an in-place operation gives back its first argument, with the mask it has now."""
    target = args[0] if args else None
    if not isinstance(target, Tensor) or result.data_ptr() != target.data_ptr():
        return wrap(result, mask, axes)
    if not isinstance(target, MaskedTensor):
        # every name that the network has for this tensor must see that it is masked now
        need(type(target) is Tensor, func, f"would write masked activations into a {type(target).__name__}")
        target.__class__ = MaskedTensor
    marked: Any = target
    marked.mask, marked.axes, marked.edge = mask, axes, None
    return target


@rule(*functions_named(UNARY + BINARY), *(getattr(Tensor, name) for name in DUNDER.split() if hasattr(Tensor, name)))
def pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Operands without a mask exist everywhere."""
    need(kwargs.pop("out", None) is None, func, "with out= has no rule")
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, MaskedTensor)]
    like = max(operands, key=lambda x: x.ndim)
    for other in operands:
        need(
            other.axes == like.axes and other.mask.size == like.mask.size,
            func,
            f"joins activations at {other.mask.size} and {like.mask.size} positions",
        )
    # an operand without a mask exists everywhere, so it takes no position away
    mask = merge_masks([keep_border(x).mask for x in operands], "add")
    result = func(*(_covered(a, mask) for a in args), **{k: _covered(v, mask) for k, v in kwargs.items()})
    _same_place(func, like, result)
    return _finish(func, args, result, mask, like.axes)


def _covered(x: Any, mask: Mask) -> Any:
    """Return the activations, zero where they do not exist but `mask` keeps the position."""
    if not isinstance(x, MaskedTensor):
        return x
    data, own = unwrap(x), keep_border(x).mask
    if own.covers(mask):
        return data
    return data * mask_like(own, data, x.axes)


@rule(*functions_named(COPIES, Tensor))
def copies(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Casts and copies."""
    need(
        isinstance(x, MaskedTensor), func, "takes the type of masked activations"
    ) if func is not Tensor.type_as else None
    if not isinstance(x, MaskedTensor):
        return func(x, *(unwrap(a) for a in args), **kwargs)
    result = func(unwrap(x), *(unwrap(a) for a in args), **kwargs)
    return result if not isinstance(result, Tensor) else wrap(result, x.mask, x.axes, x.edge)


@rule(F.linear)
def linear(func: Any, input: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Channels-last activations."""
    need(isinstance(input, MaskedTensor) and not isinstance(weight, MaskedTensor), func, "mixes positions")
    x = keep_border(input)
    need(-1 not in x.axes, func, "mixes positions: its input has no channels in the last axis")
    return wrap(func(unwrap(x), weight, bias), x.mask, x.axes)


@rule(torch.softmax, Tensor.softmax, F.softmax, torch.log_softmax, Tensor.log_softmax, F.log_softmax)
def softmax(func: Any, input: Any, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Over channels it acts on each position alone; over all positions it gives the hidden ones no weight."""
    x = keep_border(input)
    need(dim is not None, func, "does not say over which axis")
    assert dim is not None
    axis, data = dim if dim < 0 else dim - x.ndim, unwrap(x)
    need(axis != -x.ndim, func, "over samples has no rule")
    if axis in x.axes:
        need(x.axes == (axis, axis) and "log" not in func.__name__, func, "over rows or columns alone has no rule")
        kept = mask_like(x.mask, data, x.axes) > 0
        data = torch.where(kept, data, torch.finfo(data.dtype).min)
    return wrap(func(data, dim, *args, **kwargs), x.mask, x.axes)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
def matmul(func: Any, a: Any, b: Any) -> Tensor:
    """Return a sum over all positions, of what is kept (global context)."""
    for x, axis in ((a, -1), (b, -2)):
        need(not isinstance(x, MaskedTensor) or x.axes == (axis, axis), func, "mixes positions")
    return func(*(zero_hidden(keep_border(x)) if isinstance(x, MaskedTensor) else x for x in (a, b)))


@rule(
    *(getattr(Tensor, name).__get__ for name in ATTRIBUTES.split() if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in (QUESTIONS + EMPTY).split() if hasattr(Tensor, name)),
    *(getattr(torch, name) for name in (QUESTIONS + EMPTY).split() if hasattr(torch, name)),
    Tensor.__repr__,
    _REQUIRES_GRAD.__set__,
)
def asked(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Questions about the tensor, and new tensors like it: nothing of the activations is in the answer."""
    if func is Tensor.__repr__:
        return f"MaskedTensor{tuple(x.shape)}"
    if func in (Tensor.register_hook, Tensor.retain_grad, _GRAD.__get__, _REQUIRES_GRAD.__set__):
        return func(x, *args, **kwargs)
    return func(unwrap(x), *args, **kwargs)
