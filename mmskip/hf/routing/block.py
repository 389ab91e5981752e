"""Running the blocks of a transformers decoder on a subset of the tokens, exactly.

The root turns `layout=` into groups once per forward; each block selects, gathers positions, builds its own mask
over its own cache layer, runs the original block and merges.

Shape suffixes: B batch, T tokens of a call, D width, S tokens a block processes, K keys it attends to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmskip.hf.calls import ABSENT_ARGUMENTS, PER_TOKEN_ARGUMENTS, given_cache
from mmskip.hf.masks import build_mask
from mmskip.hf.routing.cache import SlotCacheLayer, check_cache, slot_layer
from mmskip.hf.routing.frames import check_not_cut, frames_of, seen_after
from mmskip.hf.routing.generate import given_prompt
from mmskip.hf.streaming.cache import StreamCache
from mmskip.ops.hf_attention import NAME as RAGGED
from mmskip.ops.hf_attention import Packings
from mmskip.ops.tokens import merge_tokens, select_tokens
from mmskip.protocols import TokenPolicy
from mmskip.replay import replayed
from mmskip.swap import bind, bind_call, state_of
from mmskip.tokens.groups import PADDING, TEXT, TokenGroups, token_groups
from mmskip.tokens.selection import Selection
from mmskip.tracing import begin_forward, report

FORWARD_KEY = "mmskip_forward"
BACKENDS = ("sdpa", "eager", "flex_attention", RAGGED)
_given_call: ContextVar["tuple[nn.Module, GivenCall] | None"] = ContextVar("mmskip_given_call", default=None)


@dataclass(frozen=True)
class BlockState:
    """What a routed block needs to know of itself."""

    policy: TokenPolicy
    index: int
    window: int | None
    config: Any
    site: str


@dataclass
class RootState:
    """What the module that calls the blocks needs to know; `checked` holds the routed blocks of the last complete
    forward."""

    blocks: tuple[nn.Module, ...]
    checked: frozenset[int] = field(default=frozenset())

    @property
    def policies(self) -> dict[int, TokenPolicy]:
        """The policies of the routed blocks, whichever configs brought them."""
        return {
            index: state_of(block, SubsetBlock).policy
            for index, block in enumerate(self.blocks)
            if isinstance(block, SubsetBlock)
        }


@dataclass(frozen=True)
class Bidirectional:
    """Tokens that see each other whatever their order, as long as all of them come in one call.

    Attributes:
        blocks_BT: LongTensor [B, T], the block of a token, -1 for a token that sees the past only.
        windowed: whether a sliding window cuts what a block sees.
    """

    blocks_BT: Tensor
    windowed: bool


@dataclass(frozen=True)
class GivenCall:
    """What a module around the root knows of the call that is about to reach the root.

    Attributes:
        layout: LongTensor [B, T], or None where the root has to find out.
        masked: whether that module builds the masks; `attention_mask` is then the padding mask it got.
        bidirectional: what those masks allow beyond causal order.
    """

    layout: Tensor | None
    masked: bool = False
    attention_mask: Tensor | None = None
    bidirectional: Bidirectional | None = None


class Forward:
    """What travels from the root to the routed blocks of one forward."""

    __slots__ = ("bidirectional", "frames", "groups", "packings", "ran", "segments_BT")

    def __init__(
        self,
        groups: TokenGroups,
        segments_BT: Tensor | None,
        bidirectional: Bidirectional | None = None,
        frames: Tensor | None = None,
    ) -> None:
        self.groups = groups
        self.segments_BT = segments_BT
        self.bidirectional = bidirectional
        self.frames = frames
        self.packings = Packings()
        self.ran: set[int] = set()


@contextmanager
def given_call(root: nn.Module, call: GivenCall) -> Iterator[None]:
    """The call of `root` inside is described by `call`."""
    token = _given_call.set((root, call))
    try:
        yield
    finally:
        _given_call.reset(token)


def check_backend(config: Any) -> None:
    """Raise unless routed blocks can build masks for the model's attention implementation."""
    if config._attn_implementation not in BACKENDS:
        raise ValueError(
            f"attn_implementation is {config._attn_implementation!r}; routed blocks support {', '.join(BACKENDS)}. "
            "Call model.set_attn_implementation('sdpa')."
        )


class LayoutRoot(nn.Module):
    """Mixin of the module that calls the blocks: turns `layout=` into groups, once per forward."""

    def forward(self, *args: Any, layout: Tensor | None = None, **kwargs: Any) -> Any:
        state: RootState = state_of(self, LayoutRoot)
        bound = bind(self, args, kwargs)
        given = _given_call.get()
        known = given[1] if given is not None and given[0] is self else None
        call = _read_call(self, state, bound, layout, known)
        begin_forward(self, call.groups.layout_BT, call.groups.real_BT)
        output = super().forward(*args, **kwargs, **{FORWARD_KEY: call})
        missing = set(state.policies) - call.ran - state.checked
        if missing:
            raise RuntimeError(
                f"blocks {sorted(missing)} of {type(self).__name__} were claimed by mmskip but did not run; something "
                "replaced or bypassed them after apply_."
            )
        state.checked |= call.ran
        return output


def _read_call(
    root: nn.Module, state: RootState, bound: dict[str, Any], layout: Tensor | None, known: GivenCall | None
) -> Forward:
    inputs = bound.get("inputs_embeds")
    inputs = bound.get("input_ids") if inputs is None else inputs
    if inputs is None:
        raise ValueError("forward got neither input_ids nor inputs_embeds.")
    batch, length = inputs.shape[:2]
    if layout is None and known is not None:
        layout = known.layout
    cache = given_cache(bound)
    if isinstance(cache, StreamCache):
        return _read_stream(state, cache, layout, inputs.device)
    check_cache(cache)
    start = cache.get_seq_length() if cache is not None else 0
    if layout is None:
        layout = _implied_layout(root, state, cache, start, (batch, length), inputs.device)
    if not isinstance(layout, Tensor):
        raise ValueError(f"layout is a {type(layout).__name__}; expected a LongTensor of shape {(batch, length)}.")
    if tuple(layout.shape) != (batch, length):
        raise ValueError(
            f"layout has shape {tuple(layout.shape)}; expected {(batch, length)}, one entry per token of this call. "
            "(Virtual tokens of peft's prompt tuning stand in front and count as text: pad the layout with -1 there.)"
        )
    mask = known.attention_mask if known is not None and known.masked else bound.get("attention_mask")
    real = _real_tokens(mask, batch, length)
    _check_router_logits(root, bound, mask, batch)
    groups = token_groups(layout, real, start).to(inputs.device)
    prompt = given_prompt(root)
    groups.prompt = None if prompt is None else prompt.shape[1]
    frames = _frames(cache, state, groups)
    for policy in state.policies.values():
        policy.prepare(groups)
    return Forward(groups, _segments(bound, real), known.bidirectional if known is not None else None, frames)


def _read_stream(state: RootState, cache: StreamCache, layout: Tensor | None, device: torch.device) -> Forward:
    """A call of running streams: the cache knows what is padding and where each stream stands."""
    if layout is None:
        raise ValueError("a call of running streams needs the layout it was announced with; pass layout=.")
    groups = token_groups(layout, cache.real_BT).to(device)
    for policy in state.policies.values():
        policy.prepare(groups)
    return Forward(groups, None)


def _implied_layout(
    root: nn.Module, state: RootState, cache: Any, start: int, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """The layout of a call without one: inside `generate`, the prompt's; one more token of a stream is text."""
    batch, length = shape
    prompt = given_prompt(root)
    if prompt is not None:
        prompt = prompt.repeat_interleave(batch // len(prompt), dim=0)
        layout = prompt.new_full((batch, start + length), TEXT)
        layout[:, : prompt.shape[1]] = prompt[:, : start + length]
        return layout[:, start:]
    if length == 1 and _slots(cache, state) is not None:
        return torch.full((batch, 1), TEXT, device=device)
    raise ValueError(
        "mmskip needs a layout to tell vision tokens from text: pass layout=, an integer tensor [batch, tokens] with "
        "the frame id of each vision token and -1 for text (all -1 for pure text). Trainer of transformers drops a "
        "column 'layout' of the dataset unless TrainingArguments(remove_unused_columns=False)."
    )


def _slots(cache: Any, state: RootState) -> SlotCacheLayer | None:
    """The cache layer of the first routed block, if it holds anything."""
    index = next(iter(state.policies))
    if cache is None or len(cache.layers) <= index:
        return None
    layer = cache.layers[index]
    return layer if isinstance(layer, SlotCacheLayer) and layer.slots is not None else None


def _frames(cache: Any, state: RootState, groups: TokenGroups) -> Tensor | None:
    """The frames seen after a call, [B, F, 3]; a frame must arrive in one call."""
    layer = _slots(cache, state)
    if layer is not None and layer.cropped and layer.frames is not None:
        check_not_cut(layer.frames, layer.total)
    return seen_after(layer.frames if layer is not None else None, frames_of(groups)) if cache is not None else None


def _check_router_logits(root: Any, bound: dict[str, Any], mask: Any, batch: int) -> None:
    """The load-balancing loss of transformers weighs the router logits of every block by one mask, for which routed
    blocks have too few; without a mask it counts what fills up the shorter rows of a batch."""
    wanted = bound.get("output_router_logits")
    if wanted is None:
        wanted = getattr(root.config, "output_router_logits", False)
    if wanted and (mask is not None or batch > 1):
        raise ValueError(
            "output_router_logits is set with an attention_mask or several rows, but routed blocks have router logits "
            "of their own tokens only, which the load-balancing loss cannot count. Set output_router_logits=False "
            "(here and in the config), or pass one row without attention_mask."
        )


def _real_tokens(mask: Any, batch: int, length: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        kind = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {kind}; routed blocks need the 2-D padding mask [batch, past + tokens] (1 real, 0 "
            "padding), from which they build their own."
        )
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected [{batch}, past + {length}].")
    return mask[:, -length:]


def _segments(bound: dict[str, Any], real: Tensor | None) -> Tensor | None:
    """Sequence numbers [B, T] of packed sequences, told by transformers' rule (positions that do not go on)."""
    positions = bound.get("position_ids")
    if positions is not None and positions.dim() == 3 and positions.shape[0] == 4:
        # M-RoPE with the text positions in front, by which transformers tells packed sequences
        positions = positions[0]
    if positions is None or positions.dim() != 2 or real is not None or given_cache(bound) is not None:
        return None
    breaks = torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1
    return breaks.cumsum(-1) if bool(breaks.any()) else None


class SubsetBlock(nn.Module):
    """Mixin of a block: runs the original block on the selected tokens only, each at its own position."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState = state_of(self, SubsetBlock)
        call: Forward
        call, bound = bind_call(self, FORWARD_KEY, f"{state.site} got no layout", args, kwargs)
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
        y_BSD = output[0] if isinstance(output, tuple) else output
        merged = merge_tokens(x_BTD, y_BSD, selection.index_BS, gate_BS, selection.valid_BS)
        call.ran.add(state.index)
        report(self, selection.keep_BT, selection.index_BS.shape[1], slots)
        return (merged, *output[1:]) if isinstance(output, tuple) else merged


def _gather_positions(value: Any, index_BS: Tensor, embedded: bool) -> Any:
    """Positions `[T]`, `[1 or B, T]` or M-RoPE's `[3, B, T]`, of the selected tokens; `embedded`: each position is a
    vector, in one more dimension at the end."""
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
    state: BlockState,
    call: Forward,
    groups: TokenGroups,
    selection: Selection,
    bound: dict[str, Any],
    x_BSD: Tensor,
) -> int:
    """Announce the new entries to the cache, put the mask into `bound`; returns the number of keys K."""
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
        # the packing leaves padding out
        allowed = None if causal else _allowed(state, query, key, None, segments, blocks)
        bound["attention_mask"] = call.packings.mask(host, host_key, query.device, allowed)
        return key.shape[1]
    allowed = _allowed(state, query, key, key_valid, segments, blocks)
    bound["attention_mask"] = build_mask(state.config, allowed, query, key.shape[1], x_BSD.dtype)
    return key.shape[1]


def _host_valid(groups: TokenGroups, selection: Selection) -> np.ndarray | None:
    """Which slots [B, S] of a selection hold real tokens, where the host knows: how many tokens a row keeps it does
    know, but of padding within a row not, how many of the tokens before it were kept."""
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


def _blocks(call: Forward, groups: TokenGroups, selection: Selection, keys: int) -> Bidirectional | None:
    """The bidirectional blocks [B, K] of the keys, of which the last S are the selected tokens. Those of earlier calls
    are complete: every token sees them as it sees the past."""
    if call.bidirectional is None:
        return None
    if call.segments_BT is not None:
        raise ValueError("token_type_ids ask for bidirectional attention within packed sequences; pass one per row.")
    index_BS = selection.index_BS
    blocks_BS = call.bidirectional.blocks_BT.to(index_BS.device).expand(groups.shape).gather(1, index_BS)
    blocks_BK = nn.functional.pad(blocks_BS, (keys - index_BS.shape[1], 0), value=-1)
    return Bidirectional(blocks_BK, call.bidirectional.windowed)


def _allowed(
    state: BlockState,
    query_BS: Tensor,
    key_BK: Tensor,
    valid_BK: Tensor | None,
    segments_BS: Tensor | None,
    blocks: Bidirectional | None,
) -> Callable[..., Tensor]:
    """Of batch, head, query and key numbers: a query sees valid keys at or before its own slot, in its window and its
    sequence, and those of its bidirectional block."""
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
