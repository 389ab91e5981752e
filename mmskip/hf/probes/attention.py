"""Read the attention of single blocks of a transformers decoder, whatever its implementation.

Shape suffixes: B batch, T tokens of a call, K keys, H query heads, G key heads (R query heads each) and groups,
E head width, Q ranking queries, N tokens of the largest group.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.hf.attention_override import (
    ConfigView,
    OverriddenAttention,
    OverrideState,
    configured_attention,
    override_change,
)
from mmskip.hf.calls import given_cache
from mmskip.hf.routing.call import ROUTING_KEY
from mmskip.hf.streaming.cache import StreamCache
from mmskip.swap import Change, around, base_class, bind, state_of
from mmskip.tokens.groups import ATTENTION_SCORES, TokenGroups
from mmskip.tokens.queries import Queries, ranking_queries

PROBE = "mmskip_probe"


@dataclass
class Probe:
    """State that a probed block shares with its attention.

    Attributes:
        which: the text that ranks a group, see `ranking_queries`.
        groups, queries: of the forward in progress; None outside of one.
    """

    which: str
    groups: TokenGroups | None = None
    queries: Queries | None = None


@dataclass
class Watch:
    """State that a watched block shares with its attention.

    Attributes:
        report: called at the end of every call with the hidden states [B, T, D] the block started from, the attention
            [B, T] that the queries paid to each token (summed over the queries, mean over the heads), and the groups.
        queries_BT: BoolTensor [B, T], the queries of the next call.
        received_BT: the attention of the call in progress.
    """

    report: Callable[[Tensor, Tensor, TokenGroups], None]
    queries_BT: Tensor | None = None
    received_BT: Tensor | None = None


class ProbedBlock(nn.Module):
    """Mixin of a block: lets its attention score the tokens of every call that has vision tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        probe: Probe = state_of(self, ProbedBlock)
        bound = bind(self, args, kwargs)
        call = bound.get(ROUTING_KEY)
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
    """Mixin of a block that processes every token: reports where its attention goes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        watch: Watch = state_of(self, WatchedBlock)
        bound = bind(self, args, kwargs)
        output = super().forward(*args, **kwargs)
        if watch.received_BT is None:
            raise RuntimeError(
                f"{type(self).__name__} did not report its attention: its self-attention does not ask its config which "
                "function to call."
            )
        watch.report(bound["hidden_states"], watch.received_BT, bound[ROUTING_KEY].groups)
        watch.received_BT = None
        return output


def probe_changes(view: Any, index: int, which: str) -> list[Change]:
    """Let a block score the tokens of every call by the attention that text pays to them: [B, T] in
    `TokenGroups.shared[ATTENTION_SCORES]`.

    Args:
        view: a decoder.
        index: of the block.
        which: the text that ranks a group, see `mmskip.tokens.queries.ranking_queries`.

    Raises:
        ValueError: the attention of the block does not read its implementation from a config.
    """
    block, probe = view.sites("block")[index], Probe(which)
    return [
        around(block, ProbedBlock, probe, aspect="probe"),
        override_change(block, _probing(view.config), probe),
    ]


def watch_changes(
    view: Any, index: int, report: Callable[[Tensor, Tensor, TokenGroups], None]
) -> tuple[Watch, list[Change]]:
    """Let a block that processes every token report, at the end of every call, where its attention goes.

    Args:
        view: a decoder.
        index: of the block.
        report: see `Watch`.

    Returns:
        The watch, whose `queries_BT` sets the queries of the next call, and the changes.

    Raises:
        ValueError: packed attention, whose masks only its own function can read.
    """
    from mmskip.ops.hf_attention import NAME

    block, watch = view.sites("block")[index], Watch(report)
    attention: Any = configured_attention(block.module)
    if attention.config._attn_implementation == NAME:
        raise ValueError(
            f"{block.name} runs {NAME}, whose masks say only where padding is; fit under the model's own attention "
            "('sdpa' or 'eager'): the weights serve both."
        )
    return watch, [
        around(block, WatchedBlock, watch, aspect="probe"),
        override_change(block, _probing(view.config), watch),
    ]


def _probing(config: Any) -> ConfigView:
    from transformers import AttentionInterface

    AttentionInterface.register(PROBE, probed_attention)
    return ConfigView(config, PROBE)


def probed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function of a probed block: reads the scores, then calls the model's own function."""
    state: OverrideState = state_of(module, OverriddenAttention)
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
    return _model_function(module, state.config)(module, query, key, value, attention_mask, **kwargs)


def _model_function(module: nn.Module, view: ConfigView) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = view.original._attn_implementation
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[base_class(module).__module__].eager_attention_forward


def _scores(
    query_BHTE: Tensor,
    key_BGKE: Tensor,
    mask: Any,
    groups: TokenGroups,
    queries: Queries,
    settings: dict[str, Any],
) -> Tensor:
    """Return the attention [B, T] that ranking queries pay to the tokens of their groups, averaged over the heads."""
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
    """Return the attention [Q, K] of the queries at some slots of a row, averaged over the heads, in fp32."""
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
    """Turn any mask that an attention function gets into a bias [Q, K] on the logits of some queries of a row."""
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
    """Raise ValueError if a frame of a packed sequence would be ranked by text of another sequence."""
    if segments_BT is None:
        return
    segments = segments_BT.expand(groups.shape).cpu().numpy()
    rows = queries.rows_Q[queries.query_G]
    if (segments[rows, queries.ends_G] != segments[rows, queries.slots_Q[queries.query_G]]).any():
        raise ValueError(
            "a frame of a packed sequence would be ranked by text of another one; end every sequence in text and use "
            "query='next', or pass one sequence per row."
        )
