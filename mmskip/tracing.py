"""What really ran: tokens and cache bytes per block, per forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmskip import families

_active: ContextVar["Trace | None"] = ContextVar("mmskip_trace", default=None)


@dataclass
class LayerRecord:
    """One block in one forward.

    Attributes:
        site: name of the block, e.g. `block.3`.
        tokens: token slots [B * T] that entered.
        ran: token slots that attention and feed-forward processed.
        keys: slots each query attended over (padding and masked ones included: they are computed).
        dense_keys: the same for the dense block.
        kept: BoolTensor [B, T] on the device, True where a token was processed; None: all.
        kv_bytes: bytes of keys and values stored for this block after the forward; 0 without a cache.
        dense_kv_bytes: the same for the dense block.
        attn, mlp: token slots that the attention and the MLP processed, where a plan runs them apart; None: `ran`.
        filled: token slots whose keys and values alone were computed, for a block or attention that was left out.
    """

    site: str
    tokens: int
    ran: int
    keys: int
    dense_keys: int
    kept: Tensor | None = None
    kv_bytes: int = 0
    dense_kv_bytes: int = 0
    attn: int | None = None
    mlp: int | None = None
    filled: int = 0


@dataclass
class ForwardRecord:
    """One forward of the model.

    Attributes:
        batch, length: B and T.
        layers: one record per block, in order.
        head_rows: positions the output head was applied to.
        layout: LongTensor [B, T] of the call, None for a model without token routing.
        real: BoolTensor [B, T], False on padding; None: no padding.
        training: whether gradients were recorded.
    """

    batch: int
    length: int
    layers: list[LayerRecord] = field(default_factory=list)
    head_rows: int = 0
    layout: Tensor | None = None
    real: Tensor | None = None
    training: bool = False


@dataclass(frozen=True)
class _VisitRecord:
    """One run of a block by a plan."""

    slots: int
    attn: bool
    mlp: int
    filled: bool
    kv_bytes: int


class Trace:
    """Records of the forwards inside `with mmskip.trace(model) as trace`."""

    def __init__(self) -> None:
        self.forwards: list[ForwardRecord] = []
        self._open: ForwardRecord | None = None
        self._pending: tuple[nn.Module, Tensor, int, int] | None = None
        self._header: tuple[nn.Module, Tensor, Tensor | None] | None = None
        self._visits: dict[int, list[_VisitRecord]] = {}

    @property
    def tokens(self) -> int:
        """Token slots that entered blocks, over all forwards."""
        return sum(layer.tokens for forward in self.forwards for layer in forward.layers)

    @property
    def ran(self) -> int:
        """Token slots that blocks processed, over all forwards."""
        return sum(layer.ran for forward in self.forwards for layer in forward.layers)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values stored after the last forward."""
        return sum(layer.kv_bytes for layer in self.forwards[-1].layers) if self.forwards else 0

    def __repr__(self) -> str:
        share = self.ran / self.tokens if self.tokens else 1.0
        return f"Trace({len(self.forwards)} forwards, {share:.1%} of {self.tokens} token slots ran)"


def begin_forward(root: nn.Module, layout_BT: Tensor, real_BT: Tensor | None) -> None:
    """Called by a routed root: the layout of the forward that is about to run."""
    trace = None if torch.compiler.is_compiling() else _active.get()
    if trace is not None:
        trace._header = (root, layout_BT, real_BT)


def report(block: nn.Module, kept_BT: Tensor, slots: int, keys: int) -> None:
    """Called by a routed block: what it processed in the call under way."""
    trace = None if torch.compiler.is_compiling() else _active.get()
    if trace is not None:
        trace._pending = (block, kept_BT, slots, keys)


def report_slot(index: int) -> None:
    """Called by a planned block: only reported visits count for it in the forward under way."""
    trace = None if torch.compiler.is_compiling() else _active.get()
    if trace is not None and trace._open is not None:
        trace._visits.setdefault(index, [])


def report_visit(
    index: int,
    x_BTD: Tensor,
    attn: bool,
    mlp: bool,
    filled: bool,
    cache: Any,
    entry: int | None,
    mlp_BT: Tensor | None = None,
) -> None:
    """Called by a planned block after a visit of block `index`, which stored in `entry` of the cache; `mlp_BT`: the
    tokens its MLP ran for, None: all."""
    trace = None if torch.compiler.is_compiling() else _active.get()
    if trace is None or trace._open is None:
        return
    layer = cache.layers[entry] if cache is not None and entry is not None and (attn or filled) else None
    stored = 0 if layer is None else sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    slots = x_BTD.shape[0] * x_BTD.shape[1]
    through = slots if mlp_BT is None else int(mlp_BT.sum())
    record = _VisitRecord(slots, attn, through if mlp else 0, filled, stored)
    trace._visits.setdefault(index, []).append(record)


def _count_visits(layer: LayerRecord, visits: list[_VisitRecord]) -> None:
    layer.ran = sum(v.slots for v in visits if v.attn or v.mlp)
    layer.attn = sum(v.slots for v in visits if v.attn)
    layer.mlp = sum(v.mlp for v in visits)
    layer.filled = sum(v.slots for v in visits if v.filled)
    layer.kv_bytes = sum(v.kv_bytes for v in visits)


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Record what runs: `with mmskip.trace(model) as trace: model(**batch)`.

    Works on changed and on untouched models. Nothing of it remains on the model afterwards. Forwards of compiled
    blocks are not seen.

    Raises:
        ValueError: no family fits the model.
        RuntimeError: another trace is being recorded.
    """
    if _active.get() is not None:
        raise RuntimeError("a trace is being recorded already; end it before the next one.")
    view = families.find(model)
    record = Trace()
    handles: list[Any] = []
    token = _active.set(record)
    try:
        handles.append(view.root.register_forward_pre_hook(_open_forward(record), with_kwargs=True))
        handles.append(view.root.register_forward_hook(_close_forward(record)))
        for index, block in enumerate(view.blocks):
            handles.append(block.register_forward_hook(_record_block(record, view, index), with_kwargs=True))
        for module in view.generators:
            head = module.get_output_embeddings()
            if head is not None:
                handles.append(head.register_forward_hook(_record_head(record)))
        yield record
    finally:
        for handle in handles:
            handle.remove()
        _active.reset(token)


def _open_forward(trace: Trace) -> Any:
    def hook(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [v for v in (*args, kwargs.get("inputs_embeds"), kwargs.get("input_ids")) if isinstance(v, Tensor)]
        batch, length = tensors[0].shape[:2]
        trace._open = ForwardRecord(batch, length, training=torch.is_grad_enabled() and root.training)

    return hook


def _close_forward(trace: Trace) -> Any:
    def hook(root: nn.Module, args: Any, output: Any) -> None:
        if trace._open is not None:
            if trace._header is not None and trace._header[0] is root:
                _, trace._open.layout, trace._open.real = trace._header
            for index, visits in trace._visits.items():
                _count_visits(trace._open.layers[index], visits)
            trace.forwards.append(trace._open)
        trace._open = trace._header = trace._pending = None
        trace._visits = {}

    return hook


def _record_block(trace: Trace, view: Any, index: int) -> Any:
    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if trace._open is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        batch, length = hidden.shape[:2]
        # blocks name their cache differently, and some get it by position
        cache = next((v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")), None)
        keys, kv_bytes, dense_kv_bytes = view.cache_use(index, cache, length)
        slots = batch * length
        layer = LayerRecord(view.site(index), slots, slots, keys, keys, None, kv_bytes, dense_kv_bytes)
        if trace._pending is not None and trace._pending[0] is block:
            _, layer.kept, slots, layer.keys = trace._pending
            layer.ran = batch * slots
        trace._pending = None
        trace._open.layers.append(layer)

    return hook


def _record_head(trace: Trace) -> Any:
    def hook(head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if trace.forwards:
            trace.forwards[-1].head_rows += output.numel() // output.shape[-1]

    return hook
