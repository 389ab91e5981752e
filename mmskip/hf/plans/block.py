"""Run the blocks of a transformers decoder by a plan: drop, shorten, repeat or reorder them.

A block keeps its place in the model's loop (its *slot*). A visit of block j runs in the slot of the highest block
visited so far: by then the model has passed the mask and positions of block j, whatever the order.

Each visit has its own cache entry. transformers reads lengths and mask sizes from the first entry of each attention
type, so a plan that stores nothing for what it leaves out renumbers the entries where that one would stay empty.

Shape suffixes: B batch, T tokens of a call, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from mmskip.hf.calls import (
    Scoped,
    StoredError,
    check_ran,
    generate_arguments,
    given_cache,
    inputs_of,
    only_new_tokens,
)
from mmskip.hf.plans.cache_entries import check_plan, entries_of
from mmskip.hf.plans.parts import (
    DROP,
    FILL,
    MIX,
    RUN,
    PlannedPart,
    part_sites,
    part_state,
    with_entry,
)
from mmskip.hf.streaming.cache import StreamCache
from mmskip.hf.structure import parts_of
from mmskip.plan import DepthPlan, Visit
from mmskip.protocols import STATE
from mmskip.recording import Work, recorder, stored_bytes
from mmskip.swap import Change, around, bind, bind_call, state_of, states_of

PLAN_KEY = "mmskip_plan"
_decode_start: Scoped[int] = Scoped("mmskip_decode_start")


@contextmanager
def decode_from(root: nn.Module, start: int) -> Iterator[None]:
    """Treat tokens from cache slot `start` on as decoded, those before as prompt, in calls of `root` inside."""
    with _decode_start.given(root, start):
        yield


@dataclass(frozen=True)
class SlotState:
    """State of a planned block in its slot.

    Attributes:
        index, site: of the block.
        blocks: all blocks of the model.
        visits: the visits that run here, with their cache entries (None: it stores nothing).
        fills: whether keys and values are stored for attentions that are left out.
        dropped: whether the plan never visits this block.
        keeps: whether the arguments of the call are kept for visits in later slots.
        entry_windows: per cache entry, the sliding window or None; used to create entries beyond the model's blocks.
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
class PlanRootState:
    """State of `PlannedRoot`.

    Attributes:
        claimed: indices of the blocks that the plan changes.
        grows: whether the plan needs more cache entries than the model has blocks.
        checked: whether all claimed blocks have been seen to run.
    """

    plan: DepthPlan
    claimed: frozenset[int]
    grows: bool
    checked: bool = field(default=False)


class PlanCall:
    """Passed from the root to the planned blocks of one forward."""

    __slots__ = ("arguments", "length", "planned", "planned_T", "ran", "start")

    def __init__(self, start: Any, length: int, planned: bool, planned_T: Tensor | None) -> None:
        self.start, self.length, self.planned, self.planned_T = start, length, planned, planned_T
        self.arguments: dict[int, dict[str, Any]] = {}
        self.ran: set[int] = set()


class PlannedRoot(nn.Module):
    """Mixin of the module that calls the blocks: distinguishes prompt tokens from decoded ones."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: PlanRootState = state_of(self, PlannedRoot)
        call = _read_call(self, state, bind(self, args, kwargs))
        output = super().forward(*args, **kwargs, **{PLAN_KEY: call})
        if not state.checked:
            check_ran(self, state.claimed, call.ran)
        state.checked = True
        return output


def _read_call(root: nn.Module, state: PlanRootState, bound: dict[str, Any]) -> PlanCall:
    """Find which tokens of a call the plan holds for."""
    inputs, cache = inputs_of(bound), given_cache(bound)
    _check_cache(cache, state)
    start = cache.get_seq_length() if cache is not None else 0
    length, phase = inputs.shape[1], state.plan.phase
    if phase == "both":
        return PlanCall(start, length, True, None)
    given = _decode_start.of(root)
    if given is None:
        decoding = length == 1 and cache is not None and bool(start > 0)
        return PlanCall(start, length, decoding == (phase == "decode"), None)
    first = given - int(start)
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
    """Mixin of a block: run the visits of its slot."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: SlotState = state_of(self, PlannedBlock)
        call: PlanCall
        call, bound = bind_call(self, PLAN_KEY, f"{state.site} got no plan", args, kwargs)
        x_BTD = bound.pop("hidden_states")
        call.ran.add(state.index)
        if (recording := recorder()) is not None:
            recording.visit(self)
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
    """Run a call that holds prompt and decoded tokens: the block runs on all of them, so that all keys and values are
    stored; planned tokens keep only the parts of the update that the plan runs."""
    if state.visits:
        return _visit(block, state, call, bound, x_BTD, state.visits[0][0], state.index)
    y_BTD = _visit(block, state, call, bound, x_BTD, Visit(state.index), state.index)
    assert call.planned_T is not None
    return torch.where(call.planned_T[None, :, None], x_BTD, y_BTD)


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
    arguments = with_entry(bound, entry) if moved and entry is not None else bound
    y_BTD = _run(block, state, call, arguments, x_BTD, visit)
    mixed = call.planned_T is not None
    fills = state.fills and cache is not None and not (visit.attn or mixed)
    _record(block, x_BTD, visit.attn or mixed, visit.mlp or mixed, fills, cache, entry)
    return y_BTD


def _record(
    block: nn.Module, x_BTD: Tensor, attn: bool, mlp: bool, filled: bool, cache: Any, entry: int | None
) -> None:
    """Report to the current trace which parts of a block ran in a visit that stored in `entry` of the cache."""
    if (recording := recorder()) is None:
        return
    slots = x_BTD.shape[0] * x_BTD.shape[1]
    stored = stored_bytes(cache, entry) if attn or filled else 0
    runs = slots if attn or mlp else 0
    recording.visit(block, Work(runs, slots * attn, slots * mlp, slots * filled, kv_bytes=stored))


def _run(
    block: nn.Module, state: SlotState, call: PlanCall, bound: dict[str, Any], x_BTD: Tensor, visit: Visit
) -> Tensor:
    """Run the original forward of the block without the parts that the visit leaves out."""
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
    return states_of(output)


def _fill(block: nn.Module, state: SlotState, call: PlanCall, bound: dict[str, Any], x_BTD: Tensor) -> None:
    """Store the keys and values of tokens that skip the block."""
    cache = given_cache(bound)
    if cache is None:
        return
    _prepare_entry(cache, state, call, state.index)
    try:
        super(PlannedBlock, block).forward(x_BTD, **with_entry(bound, state.index, stop=True))  # type: ignore[misc]
    except StoredError:
        _record(block, x_BTD, False, False, True, cache, state.index)
        return
    raise RuntimeError(f"{state.site} stored no keys and values; use cache_policy='skip'.")


def _prepare_entry(cache: Any, state: SlotState, call: PlanCall, entry: int) -> None:
    """Create cache entries for visits beyond the model's blocks, and check that the entry holds all earlier tokens."""
    while cache.layer_class_to_replicate is None and len(cache.layers) <= entry:
        window = state.entry_windows[len(cache.layers)]
        cache.layers.append(DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window))
    if entry >= len(cache.layers) or type(cache.layers[entry]) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return
    held = cache.layers[entry].get_seq_length()
    if held != call.start:
        raise RuntimeError(
            f"entry {entry} of the cache holds {held} tokens, the stream {call.start}: it was filled without this "
            "plan, or by decoding with cache_policy='skip', which stores nothing for blocks left out. Use a fresh "
            "cache, or cache_policy='recompute'."
        )


class PlannedGenerator(nn.Module):
    """Mixin of a module with `generate`: mark where the prompt ends."""

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
    """Build the changes by which a decoder runs its blocks as `plan` says.

    Raises:
        ValueError: the model cannot run this plan exactly.
    """
    count = len(view.blocks)
    check_plan(view, plan)
    entries = entries_of(plan, view.kinds)
    windows = dict(zip(entries, (view.windows[visit.block] for visit in plan.visits), strict=True))
    total = max([count, *(entry + 1 for entry in entries if entry is not None)])
    entry_windows = tuple(view.windows[i] if i < count else windows[i] for i in range(total))
    slots = _slots(plan, entries, count)
    keeps = any(visit.block != i for i, visits in slots.items() for visit, _ in visits)
    changed = list(range(count)) if keeps else _changed(slots, view.kinds)
    visited = {visit.block for visit in plan.visits}
    changes = []
    for site in view.sites("block"):
        i = site.index
        if i in changed:
            dropped, visits = i not in visited, tuple(slots[i])
            state = SlotState(i, site.name, view.blocks, visits, plan.fill, dropped, keeps, entry_windows)
            changes.append(around(site, PlannedBlock, state, "order"))
    changes += _part_changes(view, plan)
    root = PlanRootState(plan, frozenset(changed), total > count)
    changes.append(Change("decoder", view.root, PlannedRoot, root))
    if plan.phase != "both":
        changes += [Change("generate", module, PlannedGenerator, view.root) for module in view.generators]
    return changes


def _slots(plan: DepthPlan, entries: list[int | None], count: int) -> dict[int, list[tuple[Visit, int | None]]]:
    """Return the visits of each slot with their cache entries."""
    slots: dict[int, list[tuple[Visit, int | None]]] = {index: [] for index in range(count)}
    slot = 0
    for visit, entry in zip(plan.visits, entries, strict=True):
        slot = max(slot, visit.block)
        slots[slot].append((visit, entry))
    return slots


def _changed(slots: dict[int, list[tuple[Visit, int | None]]], kinds: tuple[str, ...]) -> list[int]:
    """Indices of the blocks that a plan in the order of the model changes; of the identity, all that it could."""
    plain = {i: [(Visit(i), None if kind == STATE else i)] for i, kind in enumerate(kinds)}
    return [i for i in slots if slots[i] != plain[i]] or [i for i, kind in enumerate(kinds) if kind != STATE]


def _part_changes(view: Any, plan: DepthPlan) -> list[Change]:
    changes = []
    for kind, sites in part_sites(view).items():
        for index in sorted({visit.block for visit in plan.visits if not getattr(visit, kind)}):
            if index not in sites:
                part = "attention" if kind == "attn" else "MLP"
                raise ValueError(
                    f"{view.site(index)} ({type(view.blocks[index]).__name__}) has no single module for its {part}, so "
                    "it cannot be left out alone; drop the entire block."
                )
            changes.append(around(sites[index], PlannedPart, part_state(sites[index]), "parts"))
    return changes
