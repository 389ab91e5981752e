"""Run the blocks of a transformers decoder on a subset of the tokens, exactly.

Each routed block selects tokens, gathers their positions, builds its own mask over its own cache layer, runs the
original block and merges the update.

Shape suffixes: B batch, T tokens of a call, D width, S tokens a block processes, K keys it attends to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmskip.hf.calls import ABSENT_ARGUMENTS, PER_TOKEN_ARGUMENTS, given_cache
from mmskip.hf.masks import build_mask
from mmskip.hf.routing.cache import slot_layer
from mmskip.hf.routing.call import ROUTING_KEY, Bidirectional, RoutedCall, check_backend
from mmskip.hf.streaming.cache import StreamCache
from mmskip.ops.hf_attention import NAME as RAGGED
from mmskip.ops.tokens import merge_tokens, select_tokens
from mmskip.protocols import TokenPolicy
from mmskip.recording import Work, recorder
from mmskip.replay import replayed
from mmskip.swap import bind_call, state_of, states_of, with_states
from mmskip.tokens.groups import PADDING, TokenGroups
from mmskip.tokens.selection import Selection


@dataclass(frozen=True)
class RoutedState:
    """State of a routed block.

    Attributes:
        policy: which tokens it processes.
        index: of the block.
        window: its sliding window in tokens; None: full attention.
        config: the config its attention reads.
        site: its name.
    """

    policy: TokenPolicy
    index: int
    window: int | None
    config: Any
    site: str


class RoutedBlock(nn.Module):
    """Mixin of a block: runs the original block on the selected tokens only, each at its own position."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: RoutedState = state_of(self, RoutedBlock)
        call: RoutedCall
        call, bound = bind_call(self, ROUTING_KEY, f"{state.site} got no layout", args, kwargs)
        for name in ABSENT_ARGUMENTS:
            if bound.get(name) is not None:
                raise ValueError(f"{name} is given, but routed blocks have no cross-attention; leave it out.")
        x_BTD = bound.pop("hidden_states")
        groups = call.groups.to(x_BTD.device)
        x_BTD = state.policy.enter(self, x_BTD, groups)
        selection = replayed(state.site, state.policy.select(self, x_BTD, groups), groups)
        x_BSD = select_tokens(x_BTD, selection.index_BS, selection.valid_BS)
        gate_BS = state.policy.gate(self, x_BSD, selection, groups)
        slots = _attend(state, call, groups, selection, bound, x_BSD)
        for name in PER_TOKEN_ARGUMENTS:
            if bound.get(name) is not None:
                bound[name] = _gather_positions(
                    bound[name], selection.index_BS, name not in ("position_ids", "cache_position")
                )
        output = super().forward(x_BSD, **bound)
        merged = merge_tokens(x_BTD, states_of(output), selection.index_BS, gate_BS, selection.valid_BS)
        call.ran.add(state.index)
        if (recording := recorder()) is not None:
            work = Work(selection.index_BS.numel(), keys=slots, kept=selection.keep_BT)
            recording.block(self, work)
        return with_states(output, merged)


def _gather_positions(value: Any, index_BS: Tensor, embedded: bool) -> Any:
    """Gather positions `[T]`, `[1 or B, T]` or M-RoPE's `[3, B, T]` of the selected tokens. `embedded`: positions are
    vectors, in one more dimension at the end."""
    if isinstance(value, (tuple, list)):
        return tuple(_gather_positions(v, index_BS, embedded) for v in value)
    plain_dims = value.dim() - embedded
    if plain_dims == 3:
        return torch.stack([_gather_positions(v, index_BS, embedded) for v in value])
    if plain_dims == 1:
        return value[index_BS]
    if value.shape[0] == 1:
        return value[0][index_BS]
    rows = torch.arange(len(index_BS), device=index_BS.device)[:, None]
    return value[rows, index_BS]


def _attend(
    state: RoutedState,
    call: RoutedCall,
    groups: TokenGroups,
    selection: Selection,
    bound: dict[str, Any],
    x_BSD: Tensor,
) -> int:
    """Announce the new entries to the cache, put the mask into `bound`, and return the number of keys K."""
    check_backend(state.config)
    cache = given_cache(bound)
    if isinstance(cache, StreamCache):
        bound["attention_mask"], keys = cache.attend(state.index, state.config, groups, selection, x_BSD)
        return keys
    index, valid = selection.index_BS, selection.valid_BS
    if groups.real_BT is not None and index.shape[1] == groups.shape[1]:
        real = groups.real_BT.gather(1, index)
        valid = real if valid is None else valid & real
    query = index + groups.start
    total = groups.start + groups.shape[1]
    host = host_key = _host_valid(groups, selection)
    key, key_valid, all_valid = query, valid, valid is None
    segments = None
    if cache is not None:
        layer = slot_layer(cache, state.index, state.window)
        if layer.total != groups.start:
            raise RuntimeError(
                f"{state.site} holds {layer.total} tokens of the stream in its cache, the model {groups.start}; the "
                "cache was filled or cropped outside this model."
            )
        key, key_valid, all_valid, host_key = layer.begin(query, valid, total, call.frames, host)
    elif call.segments_BT is not None:
        segments = call.segments_BT.to(index.device).expand(groups.shape).gather(1, index)
    blocks = _blocks(call, groups, selection, key.shape[1])
    cut = state.window is not None and total >= state.window
    first = query.shape[1] == key.shape[1]
    # padding slots come last, so in a first call causal order alone hides them
    ordered = all_valid or (first and valid is selection.valid_BS)
    causal = not cut and segments is None and blocks is None
    backend = state.config._attn_implementation
    if backend == "sdpa" and causal and ordered and (first or query.shape[1] == 1):
        bound["attention_mask"] = None
        return key.shape[1]
    if backend == RAGGED and host is not None and host_key is not None:
        # the packing drops padding
        allowed = None if causal else _allowed(state, query, key, None, segments, blocks)
        bound["attention_mask"] = call.packings.mask(host, host_key, query.device, allowed)
        return key.shape[1]
    allowed = _allowed(state, query, key, key_valid, segments, blocks)
    bound["attention_mask"] = build_mask(state.config, allowed, query, key.shape[1], x_BSD.dtype)
    return key.shape[1]


def _host_valid(groups: TokenGroups, selection: Selection) -> np.ndarray | None:
    """Return which slots [B, S] of a selection hold real tokens, or None where the host cannot know: it knows how many
    tokens a row keeps, but with padding inside a row not how many of them come before that padding."""
    if selection.kept_B is None:
        return None
    slots = selection.index_BS.shape[1]
    places, ends, starts = np.arange(slots), selection.kept_B, np.zeros(len(selection.kept_B), np.int64)
    if groups.real_BT is not None and slots == groups.shape[1]:
        real = groups.host_BT != PADDING
        starts = np.where(real.any(1), real.argmax(1), slots)
        after = np.where(real.any(1), real[:, ::-1].argmax(1), 0)
        if (starts + after + real.sum(1) != slots).any():
            return None
        ends = ends - after
    return (places >= starts[:, None]) & (places < ends[:, None])


def _blocks(call: RoutedCall, groups: TokenGroups, selection: Selection, keys: int) -> Bidirectional | None:
    """Return the bidirectional blocks [B, K] of the keys, the last S of which are the selected tokens. Keys of earlier
    calls belong to none: their blocks are complete, and every token sees them as part of the past."""
    if call.bidirectional is None:
        return None
    if call.segments_BT is not None:
        raise ValueError("token_type_ids ask for bidirectional attention within packed sequences; pass one per row.")
    index_BS = selection.index_BS
    blocks_BS = call.bidirectional.blocks_BT.to(index_BS.device).expand(groups.shape).gather(1, index_BS)
    blocks_BK = nn.functional.pad(blocks_BS, (keys - index_BS.shape[1], 0), value=-1)
    return Bidirectional(blocks_BK, call.bidirectional.windowed)


def _allowed(
    state: RoutedState,
    query_BS: Tensor,
    key_BK: Tensor,
    valid_BK: Tensor | None,
    segments_BS: Tensor | None,
    blocks: Bidirectional | None,
) -> Callable[..., Tensor]:
    """Return the mask function of batch, head, query and key indices: a query sees valid keys at or before its own
    slot, in its window and its sequence, and all keys of its bidirectional block."""
    window = state.window
    past = key_BK.shape[1] - query_BS.shape[1]

    def allowed(b: Any, h: Any, q: Any, k: Any) -> Tensor:
        query, key = query_BS[b, q], key_BK[b, k]
        seen: Tensor = key <= query
        if blocks is not None:
            block = blocks.blocks_BT[b, q + past]
            together = (block == blocks.blocks_BT[b, k]) & (block >= 0)
            if blocks.windowed:
                seen = seen | together
        if window is not None:
            seen = seen & (query - key < window)
        if blocks is not None and not blocks.windowed:
            seen = seen | together
        if valid_BK is not None:
            seen = seen & valid_BK[b, k]
        if segments_BS is not None:
            seen = seen & (segments_BS[b, q] == segments_BS[b, k])
        return seen

    return allowed
