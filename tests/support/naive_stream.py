"""A naive reference of a windowed stream: the whole sequence at once, without a cache, under the window's mask."""

import inspect
from collections.abc import Sequence

import torch
from naive_mod import _gate, _kept, _window
from torch import Tensor, nn


def naive_stream_logits(
    base: nn.Module,
    routers: dict[int, Tensor],
    embeds: Tensor,
    layout: Tensor,
    keep: float = 1.0,
    gate: str = "none",
    window: int | None = None,
    sinks: int = 0,
    bases: Sequence[int] | None = None,
) -> Tensor:
    """Logits [T, V] of one stream (`embeds` [T, D], `layout` [T]).

    Args:
        bases: per token, what is taken off the positions of its query and of the keys it sees, sinks excepted; None:
            absolute positions.
    """
    decoder = base.get_decoder()
    bases = [0] * len(layout) if bases is None else list(bases)
    x = embeds[None] * getattr(decoder, "embedding_multiplier", 1.0)
    for index, block in enumerate(decoder.layers):
        kept = list(range(len(layout)))
        if index in routers:
            scores = x[0].float() @ routers[index].float()
            kept = _kept(scores, layout, keep, False)
        rows = list(x[0].unbind(0))
        for offset in sorted({bases[place] for place in kept}):
            out = _block(decoder, block, index, x[:, kept], kept, window, sinks, offset)
            for slot, place in enumerate(kept):
                if bases[place] != offset:
                    continue
                weight = _gate(scores[place], gate) if index in routers and layout[place] >= 0 else 1.0
                rows[place] = rows[place] + weight * (out[0, slot] - rows[place])
        x = torch.stack(rows)[None]
    logits = base.get_output_embeddings()(decoder.norm(x))[0]
    return logits * getattr(base, "logit_scale", 1.0) / getattr(base.config, "logits_scaling", 1.0)


def _block(decoder, block, index, sub, kept, window, sinks, offset):
    own = _window(decoder.config, index)
    sinks = 0 if own is not None else sinks
    places = torch.tensor([place if place < sinks else place - offset for place in kept])[None]
    # a query among the sinks is never one of a later base, so its own position is right as well
    rotary = decoder.rotary_emb
    kinds = (decoder.config.layer_types[index],) if "layer_type" in inspect.signature(rotary.forward).parameters else ()
    query, key = torch.tensor(kept)[:, None], torch.tensor(kept)[None]
    seen = key <= query
    if own is not None:
        seen &= query - key < own
    if window is not None:
        seen &= (query - key < window) | (key < sinks)
    mask = torch.where(seen, 0.0, torch.finfo(sub.dtype).min).to(sub.dtype)[None, None]
    out = block(sub, attention_mask=mask, position_ids=places, position_embeddings=rotary(sub, places, *kinds))
    return out[0] if isinstance(out, tuple) else out
