"""The records of a trace, and the recorder through which mechanisms report what they ran.

Nothing here knows a family: blocks import it, `mmskip.tracing` drives it.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.operations import OperationCounter, Tally


@dataclass
class LayerRecord:
    """One site in one forward: a block, a stage of a UNet, a convolution of a CNN.

    Attributes:
        site: its name, e.g. `block.3`.
        tokens: token slots [B * T] that entered; positions [B * H * W] of a feature map.
        ran: token slots that were processed; those of rows that run again count again.
        keys: slots each query attended over (padding and masked ones included: they are computed); 0 where the family
            counts operations instead.
        dense_keys: the same for the dense block.
        kept: BoolTensor [B, T] on the device, True where a token was processed; None: all.
        kv_bytes: bytes of keys and values stored for this block after the forward; 0 without a cache.
        dense_kv_bytes: the same for the dense block.
        attn, mlp: token slots that the attention and the MLP processed, where they ran apart; None: `ran`.
        filled: token slots whose keys and values alone were computed, for a block or attention that was skipped.
        pairs, dense_pairs: (query, key) pairs of the attention, where a method cuts them otherwise than the tokens;
            None: in proportion to the tokens.
        recorded: a mechanism reported what ran; else the site ran in full.
        reused: the output came from an earlier forward.
        visible: share of the positions that a keep mask leaves visible, in [0, 1]; None: no mask.
        flops: counted while the site ran; None where the family's meter computes them from the numbers above.
        dense: the same for the dense model, where a meter knows it at once; None: it is found by comparison.
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
    pairs: int | None = None
    dense_pairs: int | None = None
    recorded: bool = False
    reused: bool = False
    visible: float | None = None
    flops: Tally | None = None
    dense: Tally | None = None


@dataclass
class ForwardRecord:
    """One forward of the model, or of a part that was called alone (the encoder in `generate`).

    Attributes:
        batch, length: B and T; of images, the number of positions H * W.
        layers: one record per site, in the order they ran.
        head_rows: positions the output head was applied to; 0 where the family counts operations instead.
        layout: LongTensor [B, T] of the call, None for a model without token routing.
        real: BoolTensor [B, T], False on padding; None: no padding.
        training: whether gradients were recorded.
        exits: layers that ran for each state, by stack (`encoder` [B], `decoder` [B, T], ...); empty without exits.
        outside: operations outside of the sites.
        overhead: operations of methods' decisions, such as the output head at an exit.
        shape: of the inputs, by which forwards are compared.
    """

    batch: int
    length: int
    layers: list[LayerRecord] = field(default_factory=list)
    head_rows: int = 0
    layout: Tensor | None = None
    real: Tensor | None = None
    training: bool = False
    exits: dict[str, Tensor] = field(default_factory=dict)
    outside: Tally = field(default_factory=Tally)
    overhead: Tally = field(default_factory=Tally)
    shape: tuple[Any, ...] = ()

    @property
    def ran(self) -> list[str]:
        """Names of the sites that processed anything."""
        return [layer.site for layer in self.layers if layer.ran or layer.filled]

    @property
    def reused(self) -> list[str]:
        """Names of the sites whose output came from an earlier forward."""
        return [layer.site for layer in self.layers if layer.reused]


@dataclass(frozen=True)
class Work:
    """One run of a block, or of parts of it, on some of the token slots that entered it.

    Attributes:
        slots: token slots that were processed.
        attn, mlp: of these, the slots of the attention and of the MLP, where they ran apart; None: `slots`.
        filled: token slots whose keys and values alone were computed.
        keys: slots each query attended over; None: as the dense block.
        pairs: (query, key) pairs of the attention; None: in proportion to the slots.
        kept: BoolTensor [B, T], True where a token was processed; None: all.
        kv_bytes: stored by this run, where runs store apart.
        reused: nothing ran, the output came from an earlier forward.
    """

    slots: int = 0
    attn: int | None = None
    mlp: int | None = None
    filled: int = 0
    keys: int | None = None
    pairs: int | None = None
    kept: Tensor | None = None
    kv_bytes: int | None = None
    reused: bool = False


class Trace:
    """Records of the forwards inside `with mmskip.trace(model) as trace`."""

    def __init__(self) -> None:
        self.forwards: list[ForwardRecord] = []

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


class Recorder:
    """Adds reports of mechanisms to the record of the forward under way.

    A block without a report counts as run on all its tokens.

    Attributes:
        forward: the record of the forward under way; None between forwards.
        deciding: whether `overhead` is calling a function.
    """

    def __init__(self) -> None:
        self.forward: ForwardRecord | None = None
        self.deciding = False
        self._blocks: dict[int, list[Work]] = {}
        self._visits: dict[int, list[Work]] = {}
        self._layouts: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._records: dict[int, LayerRecord] = {}

    def layout(self, root: nn.Module, layout_BT: Tensor, real_BT: Tensor | None) -> None:
        """Note the layout of the forward of `root` that is about to run its blocks."""
        self._layouts[id(root)] = (layout_BT, real_BT)

    def block(self, block: nn.Module, work: Work) -> None:
        """Record a run of a block within its own call. Several runs in one call add up."""
        if self.forward is not None:
            self._blocks.setdefault(id(block), []).append(work)

    def visit(self, block: nn.Module, work: Work | None = None) -> None:
        """Record a run of `block` wherever in the forward it takes place, as plans order them. Only its visits count
        for a block that has any; None: it has none so far."""
        if self.forward is not None:
            visits = self._visits.setdefault(id(block), [])
            visits += [] if work is None else [work]

    def exits(self, stack: str, layers: Tensor) -> None:
        """Record the layers that ran for each state of a stack."""
        if self.forward is not None:
            self.forward.exits[stack] = layers

    def overhead(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call a function of a method and count its operations apart from those of the block it runs in."""
        if self.forward is None:
            return call(*args)
        tally, before = self.forward.overhead, self.deciding
        self.deciding = True
        try:
            with OperationCounter(lambda: tally):
                return call(*args)
        finally:
            self.deciding = before

    def begin(self, forward: ForwardRecord) -> None:
        """Start the record of a forward."""
        self.reset()
        self.forward = forward

    def add(self, block: nn.Module, layer: LayerRecord) -> None:
        """Add the record of a block whose call has ended."""
        if self.forward is None:
            return
        work = self._blocks.pop(id(block), None)
        if work is not None:
            _count(layer, work)
        self._records[id(block)] = layer
        self.forward.layers.append(layer)

    def end(self, root: nn.Module) -> ForwardRecord | None:
        """Complete the record of the forward of `root`."""
        forward = self.forward
        if forward is not None:
            if id(root) in self._layouts:
                forward.layout, forward.real = self._layouts[id(root)]
            for block, visits in self._visits.items():
                _count(self._records[block], visits, apart=True)
        self.reset()
        return forward

    def reset(self) -> None:
        """Forget the forward under way."""
        self.forward = None
        for held in (self._blocks, self._visits, self._layouts, self._records):
            held.clear()


def _count(layer: LayerRecord, runs: list[Work], apart: bool = False) -> None:
    """Put the runs of a block into its record."""
    layer.recorded = True
    layer.ran = sum(run.slots for run in runs)
    layer.filled = sum(run.filled for run in runs)
    layer.reused = any(run.reused for run in runs)
    if apart:
        layer.attn = sum(run.slots if run.attn is None else run.attn for run in runs)
        layer.mlp = sum(run.slots if run.mlp is None else run.mlp for run in runs)
        layer.kv_bytes = sum(run.kv_bytes or 0 for run in runs)
    for run in runs:
        layer.keys = layer.keys if run.keys is None else run.keys
        layer.kept = layer.kept if run.kept is None else run.kept
    if any(run.pairs is not None for run in runs):
        layer.pairs = sum(run.pairs or 0 for run in runs)


active: ContextVar[Recorder | None] = ContextVar("mmskip_recorder", default=None)
"""The recorder of the trace under way."""


def recorder() -> Recorder | None:
    """Return the recorder of the trace under way; None without one, and in code that is being compiled."""
    return None if torch.compiler.is_compiling() else active.get()


def stored_bytes(cache: Any, entry: int | None) -> int:
    """Bytes of keys and values in an entry of a cache; 0 without one."""
    if cache is None or entry is None:
        return 0
    layer = cache.layers[entry]
    return sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
