"""Layer masking written from the paper's formulas, op by op, with nothing shared with the library.

Every activation x carries a mask M of its own shape as an attribute. Every operation multiplies its input by M,
computes, and multiplies its output by the new mask; shapes are moved by doing to M what is done to x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

EPS = 1e-5
POINTWISE = """relu relu6 leaky_relu elu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus prelu
dropout clamp sqrt rsqrt square exp relu_ sigmoid_ softmax mul mul_ add add_ sub div div_ __mul__ __rmul__ __imul__
__add__ __radd__ __iadd__ __sub__ __rsub__ __truediv__ __rtruediv__ __pow__ pow __neg__ maximum batch_norm layer_norm
addcmul to float contiguous type_as clone detach"""
SHAPE = "reshape view permute transpose __getitem__ split chunk unbind unsqueeze squeeze channel_shuffle expand"
QUESTIONS = """__get__ size dim numel is_floating_point is_contiguous new_empty new_zeros new_tensor zeros_like
ones_like has_names __repr__ __len__ stride ndimension get_device bernoulli_ __set__ backward is_complex new_ones"""


def masked_like(x: Tensor, mask: Tensor | None, last: bool = False, border=None) -> Tensor:
    """Attach a mask; `last`: channels stand last; `border`: (pads, value) of an explicit constant pad."""
    if mask is not None:
        x.naive_mask, x.naive_last, x.naive_border = mask, last, border
    return x


def mask_of(x):
    return getattr(x, "naive_mask", None) if isinstance(x, Tensor) else None


def box(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1) * 9


def neighbour_pad(x: Tensor, m: Tensor, rounds: int) -> Tensor:
    for _ in range(rounds):
        seen = box(m)
        x = x + (1 - m) * box(x) / (seen + EPS)
        m = (m + seen).clip(0, 1)
    return x


class Naive(TorchFunctionMode):
    """Inside, operations on tensors made by `masked_like` obey the paper's rules."""

    def __init__(self, padding: str = "neighbour", extra_rounds: int = 1, fire: bool = False) -> None:
        super().__init__()
        self.padding, self.extra_rounds, self.fire = padding, extra_rounds, fire

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = [a for arg in (*args, *kwargs.values()) for a in (arg if isinstance(arg, list | tuple) else [arg])]
        if all(mask_of(a) is None for a in flat):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        in_place = kwargs.pop("inplace", False) or (name.endswith("_") and name[0] != "_")
        if name in QUESTIONS.split():
            return func(*args, **kwargs)
        if name == "softmax" and args[0].ndim == 3:  # over space, in global context
            scores = args[0].masked_fill(args[0].naive_mask == 0, -1e30)
            return masked_like(scores.softmax(-1) * args[0].naive_mask, args[0].naive_mask)
        if name in POINTWISE.split():
            y = self.pointwise(func, name, args, kwargs)
            return rewritten(args[0], y) if in_place else y
        if name in SHAPE.split():
            return self.shape(func, name, args, kwargs)
        handler = getattr(self, name.strip("_").replace("rmatmul", "matmul"), None)
        if handler is None:
            raise NotImplementedError(f"the naive reference has no {name}")
        return handler(func, *args, **kwargs)

    def pointwise(self, func, name, args, kwargs):
        operands = [settle(a) for a in args if mask_of(a) is not None]
        mask = operands[0].naive_mask
        for x in operands[1:]:
            mask = mask * x.naive_mask
        clean = [masked(a) for a in args]
        out_of_place = getattr(torch.Tensor, name.rstrip("_"), None) if name.endswith("_") and name[0] != "_" else None
        plain = {"__iadd__": torch.add, "__imul__": torch.mul}.get(name, out_of_place or func)
        y = plain(*clean, **kwargs)
        mask = mask.expand_as(y) if mask.shape != y.shape else mask
        return masked_like(torch.where(mask > 0, y, 0), mask, operands[0].naive_last)

    def shape(self, func, name, args, kwargs):
        x = settle(args[0])
        func = torch.Tensor.reshape if name == "view" else func
        y, m = func(masked(x), *args[1:], **kwargs), func(x.naive_mask, *args[1:], **kwargs)
        last = x.naive_last
        if name in ("permute", "transpose") and x.ndim == 4:
            last = {(0, 2, 3, 1): True, (0, 3, 1, 2): False}.get(order_of(args[1:]), last)
        if name in ("view", "reshape") and y.ndim == 2:
            return self.flatten(None, x, 1)
        if isinstance(y, Tensor):
            return masked_like(y, m, last)
        return type(y)(masked_like(a, b, last) for a, b in zip(y, m, strict=True))

    def conv2d(self, func, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        kernel, d = weight.shape[2:], (dilation, dilation) if isinstance(dilation, int) else dilation
        if isinstance(padding, str):
            total = [(k - 1) * e if padding == "same" else 0 for k, e in zip(kernel, d, strict=True)]
            pads = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
        else:
            ph, pw = (padding, padding) if isinstance(padding, int) else (padding[0], padding[-1])
            pads = (pw, pw, ph, ph)
        outer = (0, 0, 0, 0)
        if x.naive_border is not None and x.naive_border[1] == 0:
            outer = x.naive_border[0]
            x = masked_like(*(F.pad(t, [-p for p in outer]) for t in (x, x.naive_mask)))
        x = settle(x)
        m = x.naive_mask[:, :1]
        rounds = max((k - 1) * e for k, e in zip(kernel, d, strict=True))
        xm = masked(x)
        if self.padding == "neighbour" and rounds:
            xm = neighbour_pad(xm, m.expand_as(xm), rounds + self.extra_rounds)
        ones = F.pad(torch.ones_like(m), outer)
        xm, m = F.pad(xm, outer), F.pad(m, outer)
        window = torch.ones(1, 1, *kernel, dtype=m.dtype)
        kept = F.conv2d(F.pad(m, pads), window, None, stride, 0, dilation)
        y = F.conv2d(F.pad(xm, pads), weight, None, stride, 0, dilation, groups)
        if self.padding == "partial" and rounds:
            y = y * F.conv2d(F.pad(ones, pads), window, None, stride, 0, dilation) / (kept + 1e-8)
        if bias is not None:
            y = y + bias.reshape(1, -1, 1, 1)
        # a window that sees the border alone holds the same for every image
        nothing = F.conv2d(F.pad(ones, pads), window, None, stride, 0, dilation) == 0
        after = ((kept > 0) | nothing).to(m).expand_as(y)
        return masked_like(y * after, after)

    def max_pool2d(self, func, x, kernel, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        m, where = x.naive_mask[:, :1], (kernel, stride, padding, dilation, ceil_mode)
        after = F.max_pool2d(m, *where).maximum((F.max_pool2d(inside(x), *where) == 0).to(m))
        y = F.max_pool2d(masked(x), *where)
        return masked_like(y * after, after.expand_as(y))

    def avg_pool2d(self, func, x, *args, **kwargs):
        m = x.naive_mask[:, :1]
        y = func(masked(x), *args, **kwargs)
        padding = kwargs.get("padding", args[2] if len(args) > 2 else 0)
        adaptive = "adaptive" in func.__name__
        if y.shape[-2:] == (1, 1) and (adaptive or (x.shape[-1] > 1 and padding in (0, (0, 0), [0, 0]))):
            return self.mean(None, x, (2, 3), True)
        after = ((func(m, *args, **kwargs) > 0) | (func(inside(x), *args, **kwargs) == 0)).to(y)
        return masked_like(y * after, after.expand_as(y))

    adaptive_avg_pool2d = avg_pool2d

    def matmul(self, func, a, b):
        return func(masked(a), masked(b))  # global context: positions against their attention

    def mean(self, func, x, dim=None, keepdim=False):
        x = settle(x)
        if over_space(x, dim):
            return masked(x).mean(dim, keepdim) / (x.naive_mask.mean(dim, keepdim) + 1e-8)
        return masked_like(masked(x).mean(dim, keepdim), x.naive_mask.amax(dim, keepdim), x.naive_last)

    def sum(self, func, x, dim=None, keepdim=False):
        x = settle(x)
        assert not over_space(x, dim)
        return masked_like(masked(x).sum(dim, keepdim), x.naive_mask.amax(dim, keepdim), x.naive_last)

    def var(self, func, x, dim=None, **kwargs):
        x = settle(x)
        assert not over_space(x, dim)
        return masked_like(
            func(masked(x), dim=dim, **kwargs), x.naive_mask.amax(dim, kwargs.get("keepdim", False)), x.naive_last
        )

    def amax(self, func, x, dim=None, keepdim=False):
        x = settle(x)
        if over_space(x, dim):
            best = x.masked_fill(x.naive_mask == 0, -1e30).amax(dim, keepdim)
            return torch.where(best > -1e29, best, torch.zeros_like(best))
        return masked_like(masked(x).amax(dim, keepdim), x.naive_mask.amax(dim, keepdim), x.naive_last)

    def adaptive_max_pool2d(self, func, x, size):
        return self.amax(func, x, (2, 3), True)

    def norm(self, func, x, p=2, dim=None, keepdim=False, dtype=None):
        assert over_space(x, dim) and p == 2
        return masked(x).square().sum(dim, keepdim).sqrt()

    def cat(self, func, tensors, dim=0):
        tensors = [settle(x) if mask_of(x) is not None else masked_like(x, torch.ones_like(x)) for x in tensors]
        axis = 1 if not tensors[0].naive_last else -1
        votes = torch.stack([x.naive_mask.narrow(axis, 0, 1) for x in tensors]).mean(0)
        after = ((votes > 0) if self.fire else (votes > 0.5)).to(tensors[0])
        y = func([masked(x) for x in tensors], dim) * after
        return masked_like(y, after.expand_as(y), tensors[0].naive_last)

    def stack(self, func, tensors, dim=0):
        after = (torch.stack([x.naive_mask for x in tensors]).mean(0) > 0.5).to(tensors[0])
        return masked_like(func([masked(x) * after for x in tensors], dim), func([after] * len(tensors), dim))

    def expand_as(self, func, x, other):
        return func(x, other)

    def linear(self, func, x, weight, bias=None):
        x = settle(x)
        y = func(masked(x), weight, bias)
        after = x.naive_mask[..., :1].expand_as(y)
        return masked_like(y * after, after, x.naive_last)

    def pad(self, func, x, pads, mode="constant", value=None):
        pads = list(pads)
        if mode != "constant":
            x = settle(x)
            return masked_like(func(masked(x), pads, mode), func(x.naive_mask, pads, mode))
        if not any(pads[:4]):
            return masked_like(
                func(masked(x), pads), func(x.naive_mask[:, :1].expand_as(x), pads, value=1.0) * spread(x, pads)
            )
        assert not any(pads[4:])
        cut = [min(p, 0) for p in pads]
        x = settle(x)
        x, pads = masked_like(F.pad(x, cut), F.pad(x.naive_mask, cut)), [max(p, 0) for p in pads]
        value = value or 0
        return masked_like(func(masked(x), pads, value=value), func(x.naive_mask, pads), border=(pads, value))

    def interpolate(self, func, x, *args, **kwargs):
        x = settle(x)
        y, m = func(masked(x), *args, **kwargs), func(x.naive_mask, *args, **kwargs)
        after = (m > 1e-6).to(m)
        return masked_like(y / m.clamp(min=1e-6) * after, after)

    def flatten(self, func, x, start_dim=0, end_dim=-1):
        x, m = settle(x), x.naive_mask
        assert start_dim == 1 and x.ndim == 4
        xm, size = masked(x), max(x.shape[-2:]) - 1
        if self.padding == "neighbour":
            xm = neighbour_pad(xm, m, size + self.extra_rounds)
        elif self.padding == "partial" and size:
            xm = xm / (m.mean((2, 3), keepdim=True) + 1e-8)
        return xm.flatten(1)

    def group_norm(self, func, x, groups, weight=None, bias=None, eps=1e-5):
        x = settle(x)
        values, m = (t.reshape(len(x), groups, -1) for t in (masked(x), x.naive_mask))
        mean = (values * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True)
        var = ((values - mean) ** 2 * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True)
        y = ((values - mean) / (var + eps).sqrt()).reshape(x.shape)
        y = y * weight.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        return masked_like(y * x.naive_mask, x.naive_mask)


def rewritten(x: Tensor, y: Tensor) -> Tensor:
    """What an in-place operation leaves: x itself, with the values and the mask of y."""
    with torch._C.DisableTorchFunction():
        x.copy_(y)
    return masked_like(x, y.naive_mask, y.naive_last)


def spread(x: Tensor, pads: list[int]) -> Tensor:
    """The mask of x over the channels that a channel pad adds."""
    return x.naive_mask[:, :1].expand(-1, x.shape[1] + sum(pads[4:6]), -1, -1)


def masked(x):
    m = mask_of(x)
    if m is None:
        return x
    if x.naive_border is not None:
        return x  # the pad was made of masked values, and its border may be -inf
    return x * m


def inside(x: Tensor) -> Tensor:
    """1 where x has an image, 0 in an explicit border."""
    if x.naive_border is None:
        return torch.ones_like(x[:1, :1])
    pads = x.naive_border[0]
    return F.pad(torch.ones_like(F.pad(x[:1, :1], [-p for p in pads])), pads)


def settle(x: Tensor) -> Tensor:
    """A border that meets something else than a convolution or a pool counts as kept."""
    if x.naive_border is None:
        return x
    pads, _ = x.naive_border
    inner = F.pad(x.naive_mask, [-p for p in pads])
    return masked_like(x * 1, F.pad(inner, pads, value=1.0))


def over_space(x: Tensor, dim) -> bool:
    dims = {d % x.ndim for d in ((dim,) if isinstance(dim, int) else dim)}
    space = {1, 2} if x.naive_last else {x.ndim - 2, x.ndim - 1}
    assert space <= dims or not space & dims, "over rows or columns alone"
    return space <= dims


def order_of(args) -> tuple[int, ...]:
    return tuple(args[0]) if isinstance(args[0], list | tuple) else tuple(args)


def naive_masked(model: torch.nn.Module, x: Tensor, mask_B1HW: Tensor, padding: str = "neighbour") -> Tensor:
    """The model's answer under a mask at the resolution of the image."""
    fire = any(type(m).__name__ == "Fire" for m in model.modules())
    start = masked_like(torch.where(mask_B1HW > 0, x, 0), mask_B1HW.to(x).expand_as(x))
    with Naive(padding, fire=fire):
        y = model(start)
    return y
