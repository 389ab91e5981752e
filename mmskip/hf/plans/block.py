"""Running the blocks of a transformers decoder by a plan: left out, in part, again, or in another order.

A block keeps its place in the model's loop (its *slot*). A visit of block j runs in the slot of the largest block
visited so far, so that the mask and positions the model hands block j are known by then, whatever the order.

Each visit has an entry of its own in the cache. transformers reads lengths and mask sizes from the first entry of each
attention type, so plans that store nothing for what they leave out number the entries anew where that one would stay
empty.

Shape suffixes: B batch, T tokens of a call, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from mmskip.hf.calls import CACHE_ARGUMENTS, generate_arguments, given_cache, only_new_tokens
from mmskip.hf.plans.cache_entries import check_plan, entries_of
from mmskip.hf.streaming.cache import StreamCache
from mmskip.hf.structure import parts_of, returned_values
from mmskip.plan import DepthPlan, Visit
from mmskip.protocols import STATE
from mmskip.swap import Change, bind, bind_call, state_of
from mmskip.tracing import report_slot, report_visit

PLAN_KEY = "mmskip_plan"


RUN, DROP, FILL, MIX = "run", "drop", "fill", "mix"


_decode_start: ContextVar[tuple[nn.Module, int] | None] = ContextVar("mmskip_decode_start", default=None)


@contextmanager
def decode_from(root: nn.Module, start: int) -> Iterator[None]:
    """Calls of `root` inside treat tokens from slot `start` of the cache on as decoded, those before as prompt."""
    token = _decode_start.set((root, start))
    try:
        yield
    finally:
        _decode_start.reset(token)


@dataclass(frozen=True)
class SlotState:
    """What a planned block does in its slot.

    Attributes:
        visits: the visits that run here, with their cache entries (None: it stores nothing).
        fills: whether keys and values are stored for attentions that are left out.
        dropped: whether no visit of the plan is of this block.
        keeps: whether the arguments of the call are kept for visits in later slots.
        entry_windows: per cache entry, the sliding window or None: entries beyond the model's blocks are made by it.
    """

    index: int
    site: str
    blocks: tuple[nn.Module, ...]
    visits: tuple[tuple[Visit, int | None], ...]
    fills: bool
    dropped: bool
    keeps: bool
    entry_windows: tuple[int | None, ...]


@dataclass
class PartState:
    """Whether the attention or MLP of a block runs in the visit under way.

    Attributes:
        returns: how many values its `forward` returns as a tuple; 0: a tensor.
        mode: it runs, adds nothing, adds nothing but stores keys and values, or adds nothing for some tokens.
        planned_T: BoolTensor [T] of mode `MIX`, True for the tokens it adds nothing to.
    """

    block: int
    returns: int
    mode: str = RUN
    planned_T: Tensor | None = None


@dataclass
class PlanRootState:
    """What the module that calls the blocks needs to know."""

    plan: DepthPlan
    claimed: frozenset[int]
    grows: bool
    checked: bool = field(default=False)


class PlanCall:
    """What travels from the root to the planned blocks of one forward."""

    __slots__ = ("arguments", "length", "planned", "planned_T", "ran", "start")

    def __init__(self, start: Any, length: int, planned: bool, planned_T: Tensor | None) -> None:
        self.start, self.length, self.planned, self.planned_T = start, length, planned, planned_T
        self.arguments: dict[int, dict[str, Any]] = {}
        self.ran: set[int] = set()


class _StoredError(Exception):
    """Ends a forward as soon as keys and values are stored."""


class EntryCache:
    """A cache whose `update` writes one given entry, and may end the forward there."""

    def __init__(self, cache: Any, entry: int, stop: bool) -> None:
        self._cache, self._entry, self._stop = cache, entry, stop

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store in the given entry whatever `layer_idx` says."""
        stored = self._cache.update(key_states, value_states, self._entry, *args, **kwargs)
        if self._stop:
            raise _StoredError
        return stored

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_cache":
            raise AttributeError(name)
        return getattr(self._cache, name)


class PlannedRoot(nn.Module):
    """Mixin of the module that calls the blocks: tells them which tokens are prompt and which are decoded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: PlanRootState = state_of(self, PlannedRoot)
        call = _read_call(self, state, bind(self, args, kwargs))
        output = super().forward(*args, **kwargs, **{PLAN_KEY: call})
        missing = state.claimed - call.ran
        if missing and not state.checked:
            raise RuntimeError(
                f"blocks {sorted(missing)} of {type(self).__name__} were claimed by mmskip but did not run; something "
                "replaced or bypassed them after apply_."
            )
        state.checked = True
        return output


def _read_call(root: nn.Module, state: PlanRootState, bound: dict[str, Any]) -> PlanCall:
    inputs = bound.get("inputs_embeds")
    inputs = bound.get("input_ids") if inputs is None else inputs
    if inputs is None:
        raise ValueError("forward got neither input_ids nor inputs_embeds.")
    cache = given_cache(bound)
    _check_cache(cache, state)
    start = cache.get_seq_length() if cache is not None else 0
    length, phase = inputs.shape[1], state.plan.phase
    if phase == "both":
        return PlanCall(start, length, True, None)
    given = _decode_start.get()
    if given is None or given[0] is not root:
        decoding = length == 1 and cache is not None and bool(start > 0)
        return PlanCall(start, length, decoding == (phase == "decode"), None)
    first = given[1] - int(start)
    if 0 < first < length:
        decoded_T = torch.arange(length, device=inputs.device) >= first
        return PlanCall(start, length, True, decoded_T if phase == "decode" else ~decoded_T)
    return PlanCall(start, length, (first <= 0) == (phase == "decode"), None)


def _check_cache(cache: Any, state: PlanRootState) -> None:
    if cache is None:
        return
    kind = type(cache).__name__
    if isinstance(cache, EncoderDecoderCache | StreamCache) or getattr(cache, "offloading", False):
        raise ValueError(
            f"past_key_values is a {kind}{' offloaded to the CPU' if getattr(cache, 'offloading', False) else ''}; "
            "layer plans serve dynamic, static and quantized caches on the device."
        )
    if state.grows and any(not isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(
            f"past_key_values is a {kind}; a plan that repeats blocks needs one cache entry per visit, which only a "
            "DynamicCache can add. In generate, leave cache_implementation out or set it to 'dynamic'."
        )


class PlannedBlock(nn.Module):
    """Mixin of a block: runs the visits of its slot."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: SlotState = state_of(self, PlannedBlock)
        call: PlanCall
        call, bound = bind_call(self, PLAN_KEY, f"{state.site} got no plan", args, kwargs)
        x_BTD = bound.pop("hidden_states")
        call.ran.add(state.index)
        report_slot(state.index)
        if state.keeps:
            call.arguments[state.index] = bound
        own = Visit(state.index)
        if not call.planned:
            return _visit(self, state, call, bound, x_BTD, own, state.index)
        if call.planned_T is not None:
            return _mixed(self, state, call, bound, x_BTD)
        for visit, entry in state.visits:
            block = state.blocks[visit.block]
            arguments = bound if visit.block == state.index else call.arguments[visit.block]
            x_BTD = _visit(block, state, call, arguments, x_BTD, visit, entry)
        if state.fills and state.dropped:
            _fill(self, state, call, bound, x_BTD)
        return x_BTD


def _mixed(block: nn.Module, state: SlotState, call: PlanCall, bound: dict[str, Any], x_BTD: Tensor) -> Tensor:
    """A call with prompt and decoded tokens: the block runs on all of them, which stores all keys and values, and the
    planned ones get what the plan leaves of its update."""
    if state.visits:
        return _visit(block, state, call, bound, x_BTD, state.visits[0][0], state.index)
    y_BTD = _visit(block, state, call, bound, x_BTD, Visit(state.index), state.index)
    assert call.planned_T is not None
    return torch.where(call.planned_T[None, :, None], x_BTD, y_BTD)


def _with_entry(bound: dict[str, Any], entry: int, stop: bool = False) -> dict[str, Any]:
    """The arguments with a cache that writes `entry`."""
    given = [name for name in CACHE_ARGUMENTS if bound.get(name) is not None]
    return {**bound, **{name: EntryCache(bound[name], entry, stop) for name in given}}


def _visit(
    block: nn.Module,
    state: SlotState,
    call: PlanCall,
    bound: dict[str, Any],
    x_BTD: Tensor,
    visit: Visit,
    entry: int | None,
) -> Tensor:
    cache = given_cache(bound)
    if cache is not None and entry is not None:
        _prepare_entry(cache, state, call, entry)
    moved = entry is not None and entry != visit.block
    arguments = _with_entry(bound, entry) if moved and entry is not None else bound
    y_BTD = _run(block, state, call, arguments, x_BTD, visit)
    whole = call.planned_T is not None
    fills = state.fills and cache is not None and not (visit.attn or whole)
    report_visit(visit.block, x_BTD, visit.attn or whole, visit.mlp or whole, fills, cache, entry)
    return y_BTD


def _run(
    block: nn.Module, state: SlotState, call: PlanCall, bound: dict[str, Any], x_BTD: Tensor, visit: Visit
) -> Tensor:
    """The block's own forward, without the parts that the visit leaves out."""
    parts = [
        (state_of(module, PlannedPart), runs)
        for module, runs in zip(parts_of(block), (visit.attn, visit.mlp), strict=True)
        if module is not None and isinstance(module, PlannedPart)
    ]
    left_out = FILL if state.fills and given_cache(bound) is not None else DROP
    for part, runs in parts:
        part.planned_T = call.planned_T
        part.mode = RUN if runs else left_out if call.planned_T is None else MIX
    try:
        output = super(PlannedBlock, block).forward(x_BTD, **bound)  # type: ignore[misc]
    finally:
        for part, _ in parts:
            part.mode, part.planned_T = RUN, None
    return output[0] if isinstance(output, tuple) else output


def _fill(block: nn.Module, state: SlotState, call: PlanCall, bound: dict[str, Any], x_BTD: Tensor) -> None:
    """Store the keys and values of tokens that pass the block by."""
    cache = given_cache(bound)
    if cache is None:
        return
    _prepare_entry(cache, state, call, state.index)
    try:
        super(PlannedBlock, block).forward(x_BTD, **_with_entry(bound, state.index, stop=True))  # type: ignore[misc]
    except _StoredError:
        report_visit(state.index, x_BTD, False, False, True, cache, state.index)
        return
    raise RuntimeError(f"{state.site} stored no keys and values; use kv='compact'.")


def _prepare_entry(cache: Any, state: SlotState, call: PlanCall, entry: int) -> None:
    """Make room for a visit beyond the model's blocks, and check that its entry holds all tokens before the call."""
    while cache.layer_class_to_replicate is None and len(cache.layers) <= entry:
        window = state.entry_windows[len(cache.layers)]
        cache.layers.append(DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window))
    if entry >= len(cache.layers) or type(cache.layers[entry]) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return
    held = cache.layers[entry].get_seq_length()
    if held != call.start:
        raise RuntimeError(
            f"entry {entry} of the cache holds {held} tokens, the stream {call.start}: it was filled without this "
            "plan, or by decoding with kv='compact', which stores nothing for blocks left out. Use a fresh cache, or "
            "kv='fill'."
        )


class PlannedPart(nn.Module):
    """Mixin of the attention or MLP of a block: adds nothing in the visits that leave it out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: PartState = state_of(self, PlannedPart)
        if state.mode == RUN:
            return super().forward(*args, **kwargs)
        if state.mode == MIX:
            output = super().forward(*args, **kwargs)
            y_BTD = output[0] if isinstance(output, tuple) else output
            assert state.planned_T is not None
            y_BTD = y_BTD.masked_fill(state.planned_T[None, :, None], 0)
            return (y_BTD, *output[1:]) if isinstance(output, tuple) else y_BTD
        bound = bind(self, args, kwargs)
        x_BTD = args[0] if args else bound["hidden_states"]
        if state.mode == FILL and getattr(self, "layer_idx", None) is not None:
            cache = given_cache(bound)
            entry = cache._entry if isinstance(cache, EntryCache) else state.block
            try:
                super().forward(**_with_entry(bound, entry, stop=True))
            except _StoredError:
                pass
            else:
                raise RuntimeError(f"the attention of block {state.block} stored no keys and values; use kv='compact'.")
        zero = torch.zeros_like(x_BTD)
        return (zero, *[None] * (state.returns - 1)) if state.returns else zero


class PlannedGenerator(nn.Module):
    """Mixin of a module with `generate`: tells the decoder where its prompt ends."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        generate: Any = super().generate  # type: ignore[misc]
        call = generate_arguments(generate, args, kwargs)
        given = call.get("input_ids")
        given = call.get("inputs_embeds") if given is None or not given.shape[1] else given
        if given is None:
            return generate(*args, **kwargs)
        cache = given_cache(call)
        start = int(cache.get_seq_length()) if cache is not None else 0
        length = given.shape[1] + (start if only_new_tokens(call, start) else 0)
        with decode_from(state_of(self, PlannedGenerator), length):
            return generate(*args, **kwargs)


def plan_changes(view: Any, plan: DepthPlan) -> list[Change]:
    """The changes by which a decoder runs its blocks as `plan` says.

    Raises:
        ValueError: the plan does not fit the model.
    """
    kinds, count = view.kinds, len(view.blocks)
    if isinstance(view.root, PlannedRoot):
        raise ValueError("this model runs a layer plan already; remove_ it, and put both into one LayerPlanConfig.")
    check_plan(view, plan)
    entries = entries_of(plan, kinds)
    slots: dict[int, list[tuple[Visit, int | None]]] = {index: [] for index in range(count)}
    slot = 0
    for visit, entry in zip(plan.visits, entries, strict=True):
        slot = max(slot, visit.block)
        slots[slot].append((visit, entry))
    windows = dict(zip(entries, (view.windows[visit.block] for visit in plan.visits), strict=True))
    total = max([count, *(entry + 1 for entry in entries if entry is not None)])
    entry_windows = tuple(view.windows[i] if i < count else windows[i] for i in range(total))
    plain = {i: [(Visit(i), None if kinds[i] == STATE else i)] for i in range(count)}
    changed = [i for i in range(count) if slots[i] != plain[i]] or [i for i in range(count) if kinds[i] != STATE]
    keeps = any(visit.block != i for i, visits in slots.items() for visit, _ in visits)
    if keeps:
        changed = list(range(count))
    visited = {visit.block for visit in plan.visits}
    changes = []
    for i in changed:
        state = SlotState(
            i, view.site(i), view.blocks, tuple(slots[i]), plan.fill, i not in visited, keeps, entry_windows
        )
        changes.append(Change(view.site(i), view.blocks[i], PlannedBlock, state))
    changes += _part_changes(view, plan)
    root = PlanRootState(plan, frozenset(changed), total > count)
    changes.append(Change("decoder", view.root, PlannedRoot, root))
    if plan.phase != "both":
        changes += [Change("generate", module, PlannedGenerator, view.root) for module in view.generators]
    return changes


def _part_changes(view: Any, plan: DepthPlan) -> list[Change]:
    changes = []
    for position, name in enumerate(("attn", "mlp")):
        for index in sorted({visit.block for visit in plan.visits if not getattr(visit, name)}):
            part = parts_of(view.blocks[index])[position]
            if part is None:
                raise ValueError(
                    f"{view.site(index)} ({type(view.blocks[index]).__name__}) has no single module for its "
                    f"{'attention' if name == 'attn' else 'MLP'}, so it cannot be left out alone; drop the whole block."
                )
            state = PartState(index, returned_values(part))
            changes.append(Change(f"{view.site(index)}.{name}", part, PlannedPart, state))
    return changes
