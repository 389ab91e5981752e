"""The decoder that calls routed blocks: turns the layout of a call into groups, once per forward.

Shape suffixes: B batch, T tokens of a call.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.hf.calls import check_ran, given_cache, inputs_of
from mmskip.hf.routing.block import RoutedBlock
from mmskip.hf.routing.cache import SlotCacheLayer, check_cache
from mmskip.hf.routing.call import NO_CONTEXT, ROUTING_KEY, CallContext, RoutedCall, call_context
from mmskip.hf.routing.frames import check_not_cut, frames_of, seen_after
from mmskip.hf.streaming.cache import StreamCache
from mmskip.protocols import TokenPolicy
from mmskip.recording import recorder
from mmskip.swap import bind, state_of
from mmskip.tokens.groups import TEXT, TokenGroups, token_groups


@dataclass
class LayoutRootState:
    """State of the decoder.

    Attributes:
        blocks: its blocks.
        checked: indices of the routed blocks that have run in some forward.
    """

    blocks: tuple[nn.Module, ...]
    checked: frozenset[int] = field(default=frozenset())

    @property
    def policies(self) -> dict[int, TokenPolicy]:
        """The policies of the routed blocks by index, of all methods."""
        return {
            index: state_of(block, RoutedBlock).policy
            for index, block in enumerate(self.blocks)
            if isinstance(block, RoutedBlock)
        }


class LayoutRoot(nn.Module):
    """Mixin of the module that calls the blocks: turns `layout=` into groups, once per forward."""

    def forward(self, *args: Any, layout: Tensor | None = None, **kwargs: Any) -> Any:
        state: LayoutRootState = state_of(self, LayoutRoot)
        call = _read_call(self, state, bind(self, args, kwargs), layout, call_context.of(self) or NO_CONTEXT)
        if (recording := recorder()) is not None:
            recording.layout(self, call.groups.layout_BT, call.groups.real_BT)
        output = super().forward(*args, **kwargs, **{ROUTING_KEY: call})
        check_ran(self, set(state.policies) - state.checked, call.ran)
        state.checked |= call.ran
        return output


def _read_call(
    root: nn.Module, state: LayoutRootState, bound: dict[str, Any], layout: Tensor | None, known: CallContext
) -> RoutedCall:
    inputs = inputs_of(bound)
    batch, length = inputs.shape[:2]
    layout = known.layout if layout is None else layout
    cache = given_cache(bound)
    if isinstance(cache, StreamCache):
        return _read_stream(state, cache, layout, inputs.device)
    check_cache(cache)
    start = cache.get_seq_length() if cache is not None else 0
    if layout is None:
        layout = _implied_layout(known.prompt, state, cache, start, (batch, length), inputs.device)
    if not isinstance(layout, Tensor):
        raise ValueError(f"layout is a {type(layout).__name__}; expected a LongTensor of shape {(batch, length)}.")
    if tuple(layout.shape) != (batch, length):
        raise ValueError(
            f"layout has shape {tuple(layout.shape)}; expected {(batch, length)}, one entry per token of this call. "
            "(Virtual tokens of peft's prompt tuning come first and count as text: pad the layout with -1 there.)"
        )
    mask = known.padding_mask if known.builds_masks else bound.get("attention_mask")
    real = _real_tokens(mask, batch, length)
    _check_router_logits(root, bound, mask, batch)
    groups = token_groups(layout, real, start).to(inputs.device)
    groups.prompt = None if known.prompt is None else known.prompt.shape[1]
    frames = _frames(cache, state, groups)
    for policy in state.policies.values():
        policy.prepare(groups)
    return RoutedCall(groups, _segments(bound, real), known.bidirectional, frames)


def _read_stream(state: LayoutRootState, cache: StreamCache, layout: Tensor | None, device: torch.device) -> RoutedCall:
    """Read a call of running streams: the cache knows the padding and the position of each stream."""
    if layout is None:
        raise ValueError("a call of running streams needs the layout that was announced for it; pass layout=.")
    groups = token_groups(layout, cache.real_BT).to(device)
    for policy in state.policies.values():
        policy.prepare(groups)
    return RoutedCall(groups, None)


def _implied_layout(
    prompt: Tensor | None,
    state: LayoutRootState,
    cache: Any,
    start: int,
    shape: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Return the layout of a call that was given none: inside `generate` a part of the prompt's, and text for one more
    token after a cached stream."""
    batch, length = shape
    if prompt is not None:
        prompt = prompt.repeat_interleave(batch // len(prompt), dim=0)
        layout = prompt.new_full((batch, start + length), TEXT)
        layout[:, : prompt.shape[1]] = prompt[:, : start + length]
        return layout[:, start:]
    if length == 1 and _slots(cache, state) is not None:
        return torch.full((batch, 1), TEXT, device=device)
    raise ValueError(
        "mmskip needs a layout to distinguish vision tokens from text: pass layout=, an integer tensor [batch, tokens] "
        "with the frame id of each vision token and -1 for text (all -1 for pure text). Trainer of transformers drops "
        "a column 'layout' of the dataset unless TrainingArguments(remove_unused_columns=False)."
    )


def _slots(cache: Any, state: LayoutRootState) -> SlotCacheLayer | None:
    """Return the cache layer of the first routed block if it holds anything, else None."""
    index = next(iter(state.policies))
    if cache is None or len(cache.layers) <= index:
        return None
    layer = cache.layers[index]
    return layer if isinstance(layer, SlotCacheLayer) and layer.slots is not None else None


def _frames(cache: Any, state: LayoutRootState, groups: TokenGroups) -> Tensor | None:
    """Return the frames seen after a call, [B, F, 3]; a frame must arrive in one call."""
    layer = _slots(cache, state)
    if layer is not None and layer.cropped and layer.frames is not None:
        check_not_cut(layer.frames, layer.total)
    return seen_after(layer.frames if layer is not None else None, frames_of(groups)) if cache is not None else None


def _check_router_logits(root: Any, bound: dict[str, Any], mask: Any, batch: int) -> None:
    """Raise ValueError where the load-balancing loss of transformers would be wrong: it weighs the router logits of
    every block by one mask, but routed blocks have fewer tokens; without a mask it counts the padding of short rows."""
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
    """Return sequence numbers [B, T] of packed sequences, or None. Same rule as transformers: a position that does not
    increment starts a new sequence."""
    positions = bound.get("position_ids")
    if positions is not None and positions.dim() == 3 and positions.shape[0] == 4:
        # M-RoPE with the text positions first, by which transformers recognises packed sequences
        positions = positions[0]
    if positions is None or positions.dim() != 2 or real is not None or given_cache(bound) is not None:
        return None
    breaks = torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1
    return breaks.cumsum(-1) if bool(breaks.any()) else None
