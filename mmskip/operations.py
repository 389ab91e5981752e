"""Counts the operations that run, by the rules of `torch.utils.flop_counter`: matrix products, convolutions and
attention, two FLOPs per multiply-add. Norms, activations, softmax, pooling and Fourier transforms count nothing."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

_aten = torch.ops.aten
_BETWEEN_ACTIVATIONS = (_aten.bmm, _aten.baddbmm)
_FIRST_FACTOR = {_aten.addmm: 1, _aten.mm: 0, _aten.convolution: 0, _aten._convolution: 0}
"""Where the activations stand among the arguments of a product with weights."""


@dataclass
class Tally:
    """Counted operations.

    Attributes:
        linear: FLOPs of products with weights.
        pairs: FLOPs of products of activations with one another: attention.
        activation_bytes: inputs and outputs of the products with weights.
    """

    linear: float = 0.0
    pairs: float = 0.0
    activation_bytes: int = 0

    @property
    def flops(self) -> float:
        """All of them."""
        return self.linear + self.pairs


class OperationCounter(TorchDispatchMode):
    """Adds every operation inside to a tally.

    Args:
        where: returns the tally that an operation goes to now; None: it is not counted.
    """

    def __init__(self, where: Callable[[], Tally | None]) -> None:
        super().__init__()
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, or the ones it is made of, and count it."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        count = _MORE.get(packet) or flop_registry.get(packet)
        if count is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        tally = self._where()
        if count is not None and tally is not None:
            _add(tally, packet, float(count(*args, **kwargs, out_val=result)), args, result)
        return result


def _add(tally: Tally, packet: Any, flops: float, args: Any, result: Any) -> None:
    place = _FIRST_FACTOR.get(packet)
    if packet in _BETWEEN_ACTIVATIONS or "attention" in packet.__name__:
        tally.pairs += flops
        return
    tally.linear += flops
    if place is not None and isinstance(result, Tensor):
        tally.activation_bytes += sum(t.numel() * t.element_size() for t in (args[place], result))


def torch_flops() -> FlopCounterMode:
    """Return torch's own counter of FLOPs, a context, which also counts attention on a CPU and the experts of a mixture
    (some versions omit them)."""
    return FlopCounterMode(display=False, custom_mapping=_MORE)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(_shape(query), _shape(key), _shape(value))


def _grouped_flops(x: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    rows, columns = _shape(x), _shape(weights)
    # groups of rows, each with its own weights; or one stack of rows for groups of columns
    return 2 * math.prod(rows) * columns[-1] // (rows[0] if len(rows) > len(columns) else 1)


def _shape(x: Any) -> Any:
    return getattr(x, "shape", x)


_MORE: dict[Any, Any] = {_aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
if hasattr(_aten, "_grouped_mm"):
    _MORE[_aten._grouped_mm] = _grouped_flops
