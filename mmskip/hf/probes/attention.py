"""Reading and choosing the attention of single blocks of a transformers model, whatever its implementation.

Attention modules of transformers ask `self.config` which function to call. A block's attention gets a view of the
config that names another function; the config itself, the other blocks and the weights stay as they are.

Shape suffixes: B batch, T tokens of a call, K keys, H query heads, G key heads (R query heads each) and groups,
E head width, Q ranking queries, N tokens of the largest group.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.hf.calls import given_cache
from mmskip.hf.routing.block import FORWARD_KEY
from mmskip.hf.streaming.cache import StreamCache
from mmskip.swap import Change, bind, state_of
from mmskip.tokens.groups import ATTENTION_SCORES, TokenGroups
from mmskip.tokens.queries import Queries, ranking_queries

PROBE = "mmskip_probe"


class ConfigView:
    """A config under which one block uses an attention implementation of its own; all else is the model's."""

    def __init__(self, config: Any, implementation: str) -> None:
        self._config = config
        self._attn_implementation = implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


@dataclass
class Probe:
    """What a probed block shares with its attention.

    Attributes:
        which: the text that ranks a group, see `ranking_queries`.
        groups, queries: of the forward under way.
    """

    which: str
    groups: TokenGroups | None = None
    queries: Queries | None = None


@dataclass
class Watch:
    """What a watched block shares with its attention, and whom it tells.

    Attributes:
        tell: called at the end of every call with the hidden states [B, T, D] the block started from, the attention
            [B, T] that the queries paid to each token there (summed over them, mean over the heads), and the groups.
        queries_BT: BoolTensor [B, T], the queries of the next call.
        received_BT: the attention of the call under way.
    """

    tell: Callable[[Tensor, Tensor, TokenGroups], None]
    queries_BT: Tensor | None = None
    received_BT: Tensor | None = None


@dataclass(frozen=True)
class AttentionState:
    """What an attention module with a view of its config needs to know."""

    config: ConfigView
    probe: Probe | Watch | None = None


class OwnAttention(nn.Module):
    """Mixin of an attention module: its `config` is a view of the model's."""

    @property
    def config(self) -> Any:
        """The config the attention reads."""
        return state_of(self, OwnAttention).config


class ProbedBlock(nn.Module):
    """Mixin of a block: has its attention score the tokens of every call that brings vision tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        probe: Probe = state_of(self, ProbedBlock)
        bound = bind(self, args, kwargs)
        call = bound.get(FORWARD_KEY)
        if call is None or not call.groups.has_vision:
            return super().forward(*args, **kwargs)
        if isinstance(given_cache(bound), StreamCache):
            raise ValueError(
                "score='attention' does not serve running streams, whose frames come before the text that would rank "
                "them; choose another score."
            )
        probe.groups = call.groups
        probe.queries = ranking_queries(call.groups, probe.which)
        _check_segments(call.groups, probe.queries, call.segments_BT)
        try:
            return super().forward(*args, **kwargs)
        finally:
            probe.groups = probe.queries = None


class WatchedBlock(nn.Module):
    """Mixin of a block that processes every token: tells where its attention goes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        watch: Watch = state_of(self, WatchedBlock)
        bound = bind(self, args, kwargs)
        output = super().forward(*args, **kwargs)
        if watch.received_BT is None:
            raise RuntimeError(
                f"{type(self).__name__} did not report its attention: its self-attention does not ask its config which "
                "function to call."
            )
        watch.tell(bound["hidden_states"], watch.received_BT, bound[FORWARD_KEY].groups)
        watch.received_BT = None
        return output


def attention_of(block: nn.Module) -> nn.Module:
    """The self-attention of a block.

    Raises:
        ValueError: the block has none that reads its implementation from a config.
    """
    for child in block.children():
        if getattr(child, "layer_idx", None) is not None and hasattr(child, "config"):
            return child
    raise ValueError(f"{type(block).__name__} has no self-attention that reads its implementation from a config.")


def own_config(config: Any, blocks: Iterable[nn.Module], implementation: str | None) -> Any:
    """The config of blocks with an attention implementation of their own; None: the model's.

    Raises:
        ValueError: an implementation that transformers does not know, or that lacks what the model needs.
    """
    if implementation is None:
        return config
    from mmskip.ops.hf_attention import NAME, register_attention

    if implementation != NAME:
        raise ValueError(f"attention is {implementation!r}; expected {NAME!r} or None, the model's own.")
    register_attention()
    if getattr(config, "attn_logit_softcapping", None) or any(hasattr(attention_of(b), "sinks") for b in blocks):
        raise ValueError(
            f"{NAME} has no soft-capped scores or attention sinks, which {type(config).__name__} asks for; use "
            "attention=None with attn_implementation='eager'."
        )
    return ConfigView(config, implementation)


def own_attention(block: nn.Module, config: ConfigView, site: str) -> Change:
    """The change by which the attention of one block reads `config`."""
    return Change(f"{site}.attn", attention_of(block), OwnAttention, AttentionState(config))


def probe_changes(block: nn.Module, config: Any, which: str, site: str) -> list[Change]:
    """The changes by which a block leaves, in `TokenGroups.shared`, the attention that text pays to each token."""
    from transformers import AttentionInterface

    AttentionInterface.register(PROBE, probed_attention)
    probe = Probe(which)
    state = AttentionState(ConfigView(config, PROBE), probe)
    return [
        Change(site, block, ProbedBlock, probe),
        Change(f"{site}.attn", attention_of(block), OwnAttention, state),
    ]


def watch_changes(block: nn.Module, config: Any, watch: Watch, site: str) -> list[Change]:
    """The changes by which a block that processes every token tells `watch` where its attention goes.

    Raises:
        ValueError: packed attention, whose masks only its own function can read.
    """
    from transformers import AttentionInterface

    from mmskip.ops.hf_attention import NAME

    attention: Any = attention_of(block)
    if attention.config._attn_implementation == NAME:
        raise ValueError(
            f"{site} runs {NAME}, whose masks say only where padding is; fit under the model's own attention "
            "('sdpa' or 'eager'): the weights serve both."
        )
    AttentionInterface.register(PROBE, probed_attention)
    state = AttentionState(ConfigView(config, PROBE), watch)
    return [Change(site, block, WatchedBlock, watch), Change(f"{site}.attn", attention, OwnAttention, state)]


def probed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a probed block: the model's own, after the scores were read."""
    state: AttentionState = state_of(module, OwnAttention)
    probe = state.probe
    if isinstance(probe, Watch) and probe.queries_BT is not None:
        with torch.no_grad():
            probe.received_BT = torch.stack(
                [
                    _attention_rows(query, key, attention_mask, row, queries.nonzero()[:, 0], kwargs).sum(0)
                    for row, queries in enumerate(probe.queries_BT.to(query.device))
                ]
            )
    elif isinstance(probe, Probe) and probe.groups is not None and probe.queries is not None:
        with torch.no_grad():
            scores = _scores(query, key, attention_mask, probe.groups.to(query.device), probe.queries, kwargs)
        probe.groups.shared[ATTENTION_SCORES] = scores
    return _own_function(module, state.config)(module, query, key, value, attention_mask, **kwargs)


def _own_function(module: nn.Module, view: ConfigView) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = view._config._attn_implementation
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    base = type(module)
    while "_mmskip_base" in base.__dict__:
        base = base._mmskip_base  # type: ignore[attr-defined]
    return sys.modules[base.__module__].eager_attention_forward


def _scores(
    query_BHTE: Tensor,
    key_BGKE: Tensor,
    mask: Any,
    groups: TokenGroups,
    queries: Queries,
    settings: dict[str, Any],
) -> Tensor:
    """Attention [B, T] that the ranking queries pay to the tokens of their groups, averaged over the heads."""
    length, keys = query_BHTE.shape[2], key_BGKE.shape[2]
    slots_Q = torch.from_numpy(queries.slots_Q).to(query_BHTE.device)
    parts = [
        _attention_rows(query_BHTE, key_BGKE, mask, row, slots_Q[queries.rows_Q == row], settings)
        for row in sorted({int(row) for row in queries.rows_Q})
    ]
    # the queries are sorted by row, as the parts are
    prob_QT = torch.cat(parts)[:, keys - length :]
    place_GN = groups.table_GN.clamp(max=groups.layout_BT.numel() - 1) % length
    query_G = torch.from_numpy(queries.query_G).to(prob_QT.device)
    scores = prob_QT.new_zeros(groups.layout_BT.numel() + 1)
    scores.scatter_(0, groups.table_GN.reshape(-1), prob_QT[query_G[:, None], place_GN].reshape(-1))
    return scores[:-1].view(groups.layout_BT.shape)


def _attention_rows(
    query_BHTE: Tensor, key_BGKE: Tensor, mask: Any, row: int, slots: Tensor, settings: dict[str, Any]
) -> Tensor:
    """Attention [Q, K] of the queries at some places of a row, averaged over the heads, in fp32."""
    length, keys = query_BHTE.shape[2], key_BGKE.shape[2]
    scale = settings.get("scaling")
    scale = query_BHTE.shape[-1] ** -0.5 if scale is None else scale
    q_GRQE = query_BHTE[row][:, slots].float().unflatten(0, (key_BGKE.shape[1], -1))
    logits = torch.einsum("grqe,gke->grqk", q_GRQE, key_BGKE[row].float()) * scale
    if settings.get("softcap") is not None:
        logits = torch.tanh(logits / settings["softcap"]) * settings["softcap"]
    logits_HQK = logits.flatten(0, 1) + _mask_rows(mask, row, slots, length, keys)
    if settings.get("s_aux") is None:
        return logits_HQK.softmax(-1).mean(0)
    sink = settings["s_aux"].float().view(-1, 1, 1).expand(-1, len(slots), 1)
    return torch.cat([logits_HQK, sink], -1).softmax(-1)[..., :-1].mean(0)


def _mask_rows(mask: Any, row: int, slots: Tensor, length: int, keys: int) -> Tensor:
    """What is added to the logits [Q, K] of some queries of a row, from any mask an attention function gets."""
    if isinstance(mask, Tensor):
        rows = mask[row if mask.shape[0] > 1 else 0, 0, slots, :keys]
        if rows.dtype != torch.bool:
            return rows.float()
        seen = rows
    else:
        k = torch.arange(keys, device=slots.device)
        if mask is None:
            seen = k <= slots[:, None] + keys - length
        else:
            b, h = torch.full_like(slots, row)[:, None], torch.zeros_like(slots)[:, None]
            seen = mask.mask_mod(b, h, slots[:, None], k[None])
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)


def _check_segments(groups: TokenGroups, queries: Queries, segments_BT: Tensor | None) -> None:
    """In packed sequences a frame must be ranked by text of its own sequence."""
    if segments_BT is None:
        return
    segments = segments_BT.expand(groups.shape).cpu().numpy()
    rows = queries.rows_Q[queries.query_G]
    if (segments[rows, queries.ends_G] != segments[rows, queries.slots_Q[queries.query_G]]).any():
        raise ValueError(
            "a frame of a packed sequence would be ranked by text of another one; end every sequence in text and use "
            "query='next', or pass one sequence per row."
        )
