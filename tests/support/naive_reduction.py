"""A naive reference of token reduction: one row, no cache, tokens really taken out of the sequence."""

from collections.abc import Callable

import torch
from naive_mod import _mask, _window
from torch import Tensor, nn


def naive_reduced_logits(
    base: nn.Module, ids: Tensor, layout: Tensor, after: int, choose: Callable[[Tensor], tuple[list[int], Tensor]]
) -> tuple[Tensor, list[int]]:
    """Logits [S, V] of the kept tokens of one row and their places; `choose` turns the hidden states [T, D] before
    block `after` into those of the kept tokens."""
    decoder = base.get_decoder()
    positions = torch.arange(len(ids))
    x = decoder.embed_tokens(ids)[None] * getattr(decoder, "embedding_multiplier", 1.0)
    rotary = decoder.rotary_emb(x, position_ids=positions[None])
    kept = list(range(len(ids)))
    for index, block in enumerate(decoder.layers):
        if index == after:
            kept, rows = choose(x[0])
            x = rows[None]
        out = block(
            x,
            attention_mask=_mask(kept, _window(base.config, index), x.dtype),
            position_ids=positions[kept][None],
            position_embeddings=tuple(r[:, kept] for r in rotary),
        )
        x = out[0] if isinstance(out, tuple) else out
    logits = base.get_output_embeddings()(decoder.norm(x))[0]
    scale = getattr(base, "logit_scale", None)
    logits = logits if scale is None else logits * scale
    return logits / getattr(base.config, "logits_scaling", 1.0), kept


def attention_scores(base: nn.Module, ids: Tensor, layout: Tensor, block: int, query: str) -> Tensor:
    """Attention [T] that the ranking text pays to each vision token in a block, mean over heads, by the eager model."""
    attention = base.config._attn_implementation
    base.set_attn_implementation("eager")
    weights = base(ids[None], output_attentions=True, use_cache=False).attentions[block][0].mean(0)
    base.set_attn_implementation(attention)
    scores = torch.zeros(len(ids))
    text = [t for t in range(len(ids)) if layout[t] < 0]
    for frame in {int(f) for f in layout if f >= 0}:
        members = [t for t in range(len(ids)) if int(layout[t]) == frame]
        ranking = text[-1] if query == "last" else min(t for t in text if t > members[-1])
        scores[members] = weights[ranking, members]
    return scores
