"""Family `hf_decoder`: causal language models of transformers, found by structure.

Shape suffixes: B batch, T tokens of a call, D width, S tokens a block processes, K keys it attends to.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmskip import trace as tracing
from mmskip.families.hf_cache import SlotCacheLayer, slot_layer
from mmskip.ops.tokens import merge_tokens, select_tokens
from mmskip.routers import TEXT, Selection, TokenGroups, token_groups
from mmskip.swap import Change, bind, has_mixin, state_of

FORWARD_KEY = "mmskip_forward"
BACKENDS = ("sdpa", "eager", "flex_attention")
_BLOCK_ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "position_embeddings",
    "output_attentions",
    "output_router_logits",
    "kwargs",
}
_PER_TOKEN = ("position_ids", "position_embeddings", "cache_position")
_prompt_layout: ContextVar[tuple[nn.Module, Tensor] | None] = ContextVar("mmskip_prompt_layout", default=None)


class TokenPolicy(Protocol):
    """What a method says of one block: which tokens it processes and how their update is weighted."""

    def select(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Selection: ...

    def gate(self, block: nn.Module, x_BSD: Tensor, selection: Selection, groups: TokenGroups) -> Tensor | None:
        """Multiplier [B, S] of the update of the selected tokens; None means 1."""


@dataclass(frozen=True)
class DecoderView:
    """A causal decoder: the module that calls the blocks (`root`), and the blocks in order.

    Attributes:
        windows: per block, the sliding window in tokens, or None for full attention.
        generators: the modules around the root that have `generate`.
    """

    family: str
    root: nn.Module
    blocks: tuple[nn.Module, ...]
    windows: tuple[int | None, ...]
    generators: tuple[nn.Module, ...]

    @property
    def config(self) -> Any:
        """The text config of the model."""
        return self.root.config

    @property
    def width(self) -> int:
        """Hidden width D."""
        return int(self.config.hidden_size)

    def site(self, index: int) -> str:
        """The site name of a block."""
        return f"block.{index}"

    def attention_types(self) -> tuple[str, ...]:
        """Per block, `full` or `sliding`."""
        return tuple("full" if window is None else "sliding" for window in self.windows)

    def matrix_products(self, index: int) -> list[tuple[int, int, int]]:
        """Weight matrices of a block that every token is multiplied by: (inputs, outputs, how many).

        Raises:
            ValueError: the block has expert weights whose use per token the config does not tell.
        """
        products = []
        for module in self.blocks[index].modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                products.append((weight.shape[0], weight.shape[1], 1))  # type: ignore[union-attr]
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dim() == 3:
                    products.append((parameter.shape[1], parameter.shape[2], self._experts_per_token()))
        return products

    def _experts_per_token(self) -> int:
        count = getattr(self.config, "num_experts_per_tok", None)
        if count is None:
            raise ValueError(f"{type(self.config).__name__} does not say how many experts a token uses.")
        return int(count)

    def attention_width(self, index: int) -> int:
        """Heads times head width of the queries of a block."""
        head = getattr(self.config, "head_dim", None) or self.width // self.config.num_attention_heads
        return int(head * self.config.num_attention_heads)

    def item_bytes(self, index: int) -> int:
        """Bytes of one number of the hidden states."""
        return next(p.element_size() for p in self.blocks[index].parameters() if p.is_floating_point())

    def router_parameters(self, index: int) -> list[nn.Parameter]:
        """The weights that mmskip added to a block."""
        return [p for n, p in self.blocks[index].named_parameters() if n.startswith("mmskip_")]

    def cache_use(self, index: int, cache: Any, length: int) -> tuple[int, int, int]:
        """After a call with `length` tokens: keys a dense block attends over, KV bytes stored, KV bytes a dense block
        stores."""
        if cache is None:
            return length, 0, 0
        total, window = cache.get_seq_length(index), self.windows[index]
        past = total - length if window is None else min(total - length, window - 1)
        stored = total if window is None else min(total, window - 1)
        entry = cache.layers[index]
        per_slot = 2 * entry.keys[:, :, :1].numel() * entry.keys.element_size()
        return past + length, per_slot * entry.keys.shape[-2], per_slot * stored

    def subset_changes(
        self, policies: Mapping[int, TokenPolicy], children: Mapping[int, dict[str, nn.Module]]
    ) -> list[Change]:
        """The changes by which the blocks in `policies` process a subset of the tokens of every call."""
        changes = [
            Change(
                self.site(i),
                self.blocks[i],
                SubsetBlock,
                BlockState(policy, i, self.windows[i], self.config, self.site(i)),
                children[i],
            )
            for i, policy in policies.items()
        ]
        changes.append(Change("decoder", self.root, LayoutRoot, RootState(tuple(policies))))
        changes += [Change("generate", module, LayoutGenerator, self.root) for module in self.generators]
        return changes


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
    """What the module that calls the blocks needs to know; `checked` after the first complete forward."""

    routed: tuple[int, ...]
    checked: bool = field(default=False)


class Forward:
    """What travels from the root to the routed blocks of one forward."""

    __slots__ = ("groups", "ran", "segments_BT")

    def __init__(self, groups: TokenGroups, segments_BT: Tensor | None) -> None:
        self.groups = groups
        self.segments_BT = segments_BT
        self.ran: set[int] = set()


def match(model: nn.Module) -> tuple[DecoderView | None, str]:
    """The view of `model`, or None and the reason why it does not fit."""
    from transformers import PreTrainedModel

    found = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) and all(_is_causal_block(b) for b in child):
                    found.append((module, tuple(child)))
    if not found:
        return None, (
            "needs a transformers causal decoder: a PreTrainedModel with a list of decoder layers that take "
            f"`hidden_states` and hold a causal self-attention with a `layer_idx`; {type(model).__name__} has none"
        )
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module, _ in found)
        return None, f"found several stacks of decoder layers ({names}); pass the one to be changed"
    root, blocks = found[0]
    reason = _unfit(model, root, blocks)
    if reason:
        return None, reason
    generators = tuple(
        m for m in model.modules() if isinstance(m, PreTrainedModel) and m.can_generate() and _contains(m, root)
    )
    return DecoderView("hf_decoder", root, blocks, _windows(root.config, len(blocks)), generators), ""


def _contains(module: nn.Module, inner: nn.Module) -> bool:
    return any(child is inner for child in module.modules())


def _is_causal_block(block: nn.Module) -> bool:
    if "hidden_states" not in inspect.signature(block.forward).parameters:
        return False
    return any(
        getattr(child, "is_causal", False) and getattr(child, "layer_idx", None) is not None
        for child in block.children()
    )


def _unfit(model: nn.Module, root: nn.Module, blocks: Sequence[nn.Module]) -> str:
    config: Any = root.config
    name = type(root).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is part of an encoder-decoder model"
    if any(getattr(getattr(m, "config", None), "vision_config", None) is not None for m in model.modules()):
        return f"{name} stands in a vision-language model, whose frames only its own family can tell"
    if len(blocks) != config.num_hidden_layers:
        return f"{name} has {len(blocks)} decoder layers, its config says {config.num_hidden_layers}"
    types = set(getattr(config, "layer_types", None) or ())
    if not types <= {"full_attention", "sliding_attention"}:
        return f"{name} has layers of type {', '.join(sorted(types))}; only full and sliding attention can be routed"
    for owner in (root, blocks[0]):
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(owner.forward).parameters.values()):
            return f"{type(owner).__name__}.forward drops unknown keywords, so the layout cannot reach the layers"
    unknown = set(inspect.signature(blocks[0].forward).parameters) - _BLOCK_ARGUMENTS
    if unknown:
        return f"{type(blocks[0]).__name__} takes {', '.join(sorted(unknown))}, which a subset of tokens cannot serve"
    return ""


def _windows(config: Any, count: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * count
    return tuple(window if kind == "sliding_attention" else None for kind in types[:count])


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
        call = _read_call(self, state, bound, layout)
        tracing.begin_forward(self, call.groups.layout_BT, call.groups.real_BT)
        output = super().forward(*args, **kwargs, **{FORWARD_KEY: call})
        missing = set(state.routed) - call.ran
        if not state.checked and missing:
            raise RuntimeError(
                f"blocks {sorted(missing)} of {type(self).__name__} were claimed by mmskip but did not run; something "
                "replaced or bypassed them after apply_."
            )
        state.checked = True
        return output


def _read_call(root: nn.Module, state: RootState, bound: dict[str, Any], layout: Tensor | None) -> Forward:
    inputs = bound.get("inputs_embeds")
    inputs = bound.get("input_ids") if inputs is None else inputs
    if inputs is None:
        raise ValueError("forward got neither input_ids nor inputs_embeds.")
    batch, length = inputs.shape[:2]
    cache = bound.get("past_key_values")
    start = cache.get_seq_length() if cache is not None else 0
    if not isinstance(start, int):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} of fixed size; routed blocks store a different number of "
            "tokens per row and need a DynamicCache."
        )
    if layout is None:
        layout = _implied_layout(root, state, cache, start, (batch, length), inputs.device)
    if tuple(layout.shape) != (batch, length):
        raise ValueError(
            f"layout has shape {tuple(layout.shape)}; expected {(batch, length)}, one entry per token of this call."
        )
    real = _real_tokens(bound.get("attention_mask"), batch, length)
    groups = token_groups(layout, real, start).to(inputs.device)
    _check_frames_whole(groups, _tail(cache, state))
    return Forward(groups, _segments(bound, real))


def _implied_layout(
    root: nn.Module, state: RootState, cache: Any, start: int, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """The layout of a call without one: inside `generate`, the prompt's; one more token of a stream is text."""
    batch, length = shape
    given = _prompt_layout.get()
    if given is not None and given[0] is root:
        prompt = given[1].repeat_interleave(batch // given[1].shape[0], dim=0)
        layout = prompt.new_full((batch, start + length), TEXT)
        layout[:, : prompt.shape[1]] = prompt[:, : start + length]
        return layout[:, start:]
    if length == 1 and _tail(cache, state) is not None:
        return torch.full((batch, 1), TEXT, device=device)
    raise ValueError(
        "mmskip needs a layout to tell vision tokens from text: pass layout=, an integer tensor [batch, tokens] with "
        "the frame id of each vision token and -1 for text (all -1 for pure text)."
    )


def _tail(cache: Any, state: RootState) -> Tensor | None:
    index = state.routed[0]
    if cache is None or len(cache.layers) <= index or not isinstance(cache.layers[index], SlotCacheLayer):
        return None
    return cache.layers[index].tail


def _check_frames_whole(groups: TokenGroups, tail: Tensor | None) -> None:
    """A frame must arrive in one call: its top-k cannot be taken in parts."""
    if tail is None or not groups.has_vision:
        return
    first = groups.layout_BT[:, 0]
    split = ((tail.to(first.device) == first) & (first != TEXT)).nonzero()
    if len(split):
        row = int(split[0])
        raise ValueError(
            f"frame {int(first[row])} of row {row} goes on from the previous call; pass all tokens of a frame in one "
            "call, and give consecutive frames different ids."
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
    if positions is None or positions.dim() != 2 or real is not None:
        return None
    breaks = torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1
    return breaks.cumsum(-1) if bool(breaks.any()) else None


class LayoutGenerator(nn.Module):
    """Mixin of a module with `generate`: takes `layout=` of the prompt and hands it to the decoder."""

    def generate(self, *args: Any, layout: Tensor | None = None, **kwargs: Any) -> Any:
        if layout is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        token = _prompt_layout.set((state_of(self, LayoutGenerator), layout))
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _prompt_layout.reset(token)


class SubsetBlock(nn.Module):
    """Mixin of a block: runs the original block on the selected tokens only, each at its own position."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState = state_of(self, SubsetBlock)
        bound = bind(self, args, kwargs)
        call: Forward | None = bound.pop(FORWARD_KEY, None)
        if call is None:
            raise RuntimeError(
                f"{state.site} got no layout: {type(self).__name__} was called outside the model that mmskip was "
                "applied to, or a module in between drops unknown keywords."
            )
        x_BTD = bound.pop("hidden_states")
        groups = call.groups.to(x_BTD.device)
        selection = state.policy.select(self, x_BTD, groups)
        x_BSD = select_tokens(x_BTD, selection.index_BS, selection.valid_BS)
        gate_BS = state.policy.gate(self, x_BSD, selection, groups)
        slots = _attend(state, call, groups, selection, bound, x_BSD)
        for name in _PER_TOKEN:
            if bound.get(name) is not None:
                bound[name] = _gather_positions(bound[name], selection.index_BS)
        output = super().forward(x_BSD, **bound)
        y_BSD = output[0] if isinstance(output, tuple) else output
        merged = merge_tokens(x_BTD, y_BSD, selection.index_BS, gate_BS, selection.valid_BS)
        call.ran.add(state.index)
        tracing.report(self, selection.keep_BT, selection.index_BS.shape[1], slots)
        return (merged, *output[1:]) if isinstance(output, tuple) else merged


def _gather_positions(value: Any, index_BS: Tensor) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_gather_positions(v, index_BS) for v in value)
    if value.dim() == 1:
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
    index, valid = selection.index_BS, selection.valid_BS
    if groups.real_BT is not None and index.shape[1] == groups.shape[1]:
        real = groups.real_BT.gather(1, index)
        valid = real if valid is None else valid & real
    query = index + groups.start
    total = groups.start + groups.shape[1]
    key, key_valid, all_valid = query, valid, valid is None
    cache = bound.get("past_key_values")
    segments = None
    if cache is not None:
        layer = slot_layer(cache, state.index, state.window)
        if layer.total != groups.start:
            raise RuntimeError(
                f"{state.site} holds {layer.total} tokens of the stream in its cache, the model {groups.start}; the "
                "cache was filled or cropped outside this model."
            )
        key, key_valid, all_valid = layer.begin(query, valid, total, groups.layout_BT[:, -1])
    elif call.segments_BT is not None:
        segments = call.segments_BT.to(index.device).expand(groups.shape).gather(1, index)
    cut = state.window is not None and total >= state.window
    first = query.shape[1] == key.shape[1]
    # padding slots come last, so in a first call causal order alone hides them
    ordered = all_valid or (first and valid is selection.valid_BS)
    plain = ordered and not cut and segments is None and (first or query.shape[1] == 1)
    if plain and state.config._attn_implementation == "sdpa":
        bound["attention_mask"] = None
    else:
        bound["attention_mask"] = _mask(state, query, key, key_valid, segments, x_BSD)
    return key.shape[1]


def _mask(
    state: BlockState,
    query_BS: Tensor,
    key_BK: Tensor,
    valid_BK: Tensor | None,
    segments_BS: Tensor | None,
    x_BSD: Tensor,
) -> Any:
    """The mask by which a query sees valid keys at or before its own slot, in its window and its sequence."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    window = state.window

    def allowed(b: Any, h: Any, q: Any, k: Any) -> Any:
        query, key = query_BS[b, q], key_BK[b, k]
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        if valid_BK is not None:
            seen = seen & valid_BK[b, k]
        if segments_BS is not None:
            seen = seen & (segments_BS[b, q] == segments_BS[b, k])
        return seen

    build: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[state.config._attn_implementation]
    return build(
        batch_size=query_BS.shape[0],
        q_length=query_BS.shape[1],
        kv_length=key_BK.shape[1],
        q_offset=0,
        kv_offset=0,
        mask_function=allowed,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=x_BSD.dtype,
        config=state.config,
        use_vmap=False,
        device=x_BSD.device,
    )


def routed_caches(cache: Any) -> list[SlotCacheLayer]:
    """The layers of a cache that belong to routed blocks."""
    return [layer for layer in cache.layers if isinstance(layer, SlotCacheLayer)]


def find_root(model: nn.Module) -> nn.Module | None:
    """The root of a decoder changed by this family, if there is one in `model`."""
    return next((m for m in model.modules() if has_mixin(m, LayoutRoot)), None)
