"""A naive reference of mixture-of-depths routing: one row at a time, no cache, Python loops.

It calls the blocks of an untouched copy of the model, each with an explicit mask and position embeddings.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def naive_logits(
    base: nn.Module,
    routers: dict[int, Tensor | Callable[[Tensor], Tensor]],
    ids: Tensor,
    layout: Tensor,
    keep: float,
    gate: str,
    force_last: bool = False,
    record: dict[int, list[int]] | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits [T, V] of one row (`ids`, `layout`: [T]); `routers`: weights [D], or functions [T, D] -> [T]."""
    decoder = base.get_decoder()
    positions = torch.arange(len(ids)) if positions is None else positions
    x = decoder.embed_tokens(ids)[None]
    x = x * getattr(decoder, "embedding_multiplier", 1.0)
    rotary = decoder.rotary_emb(x, position_ids=positions[None])
    for index, block in enumerate(decoder.layers):
        kept = list(range(len(ids)))
        if index in routers:
            router = routers[index]
            scores = router(x[0]) if callable(router) else x[0].float() @ router.float()
            kept = _kept(scores, layout, keep, force_last)
            if record is not None:
                record[index] = kept
        window = _window(base.config, index)
        sub = x[:, kept]
        out = block(
            sub,
            attention_mask=_mask(kept, window, sub.dtype),
            position_ids=positions[kept][None],
            position_embeddings=tuple(r[:, kept] for r in rotary),
        )
        out = out[0] if isinstance(out, tuple) else out
        rows = list(x[0].unbind(0))
        for slot, place in enumerate(kept):
            weight = 1.0
            if index in routers and layout[place] >= 0:
                weight = _gate(scores[place], gate)
            rows[place] = rows[place] + weight * (out[0, slot] - rows[place])
        x = torch.stack(rows)[None]
    hidden = decoder.norm(x)
    logits = base.get_output_embeddings()(hidden)[0]
    scale = getattr(base, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    return logits / getattr(base.config, "logits_scaling", 1.0)


def _kept(scores: Tensor, layout: Tensor, keep: float, force_last: bool) -> list[int]:
    kept = [t for t in range(len(layout)) if layout[t] < 0]
    for frame in sorted({int(f) for f in layout if f >= 0}):
        members = [t for t in range(len(layout)) if int(layout[t]) == frame]
        k = max(1, round(keep * len(members)))
        best = sorted(
            members, key=lambda t: (-(float("inf") if force_last and t == members[-1] else scores[t].item()), t)
        )
        kept += best[:k]
    return sorted(kept)


def _gate(score: Tensor, gate: str) -> Tensor | float:
    return {"linear": score, "sigmoid": torch.sigmoid(score), "tanh": 1 + 0.2 * torch.tanh(score), "none": 1.0}[gate]


def _window(config, index: int) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _mask(kept: list[int], window: int | None, dtype: torch.dtype) -> Tensor:
    mask = torch.full((1, 1, len(kept), len(kept)), torch.finfo(dtype).min, dtype=dtype)
    for i, query in enumerate(kept):
        for j, key in enumerate(kept):
            if key <= query and (window is None or query - key < window):
                mask[0, 0, i, j] = 0
    return mask


class NaiveBlock(nn.Module):
    """A block in the place of the original one: row by row, it takes the kept tokens out of what the dense model hands
    every block (hidden states, positions, the full mask) and runs the original on them."""

    def __init__(self, block: nn.Module, weight: Tensor | None, layout: Tensor, keep: float, gate: str) -> None:
        super().__init__()
        self.block, self.weight, self.layout, self.keep, self.gate = block, weight, layout, keep, gate
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, x, attention_mask=None, position_embeddings=None, position_ids=None, **kwargs):
        if self.weight is None:
            return self.block(
                x, attention_mask=attention_mask, position_embeddings=position_embeddings, position_ids=position_ids
            )
        rows = []
        for b, row in enumerate(x):
            scores = row.float() @ self.weight.float()
            kept = _kept(scores, self.layout[b], self.keep, False)
            positions = tuple(
                p.expand(*p.shape[:-3], len(x), -1, -1)[..., b : b + 1, kept, :] for p in position_embeddings
            )
            out = self.block(
                x[b : b + 1, kept],
                attention_mask=attention_mask[b : b + 1, :, kept][..., kept],
                position_embeddings=positions,
                position_ids=None,
            )
            out = out[0] if isinstance(out, tuple) else out
            tokens = list(row.unbind(0))
            for slot, place in enumerate(kept):
                weight = _gate(scores[place], self.gate) if self.layout[b, place] >= 0 else 1.0
                tokens[place] = tokens[place] + weight * (out[0, slot] - tokens[place])
            rows.append(torch.stack(tokens))
        return torch.stack(rows)


def make_naive(base: nn.Module, routers: dict[int, Tensor], layout: Tensor, keep: float, gate: str) -> nn.Module:
    """Change an untouched VLM, which must run eager attention, so that it routes naively a batch of this layout [B, T]
    in a call without a cache."""
    decoder = base.get_decoder()
    for index, block in enumerate(decoder.layers):
        decoder.layers[index] = NaiveBlock(block, routers.get(index), layout, keep, gate)
    return base
