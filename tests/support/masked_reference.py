"""A second reference of token routing, which works for every decoder: the dense block on all tokens, with the keys of
the tokens left out masked. Nothing is gathered, so positions, windows and caches of the library play no part."""

import types
from contextlib import contextmanager
from inspect import signature

import torch
from naive_mod import _gate, _kept
from tiny_decoders import blocks_of
from torch import Tensor, nn


@contextmanager
def masked_routing(base: nn.Module, routers: dict[int, Tensor], layout: Tensor, keep: float, gate: str):
    """Inside, `base` (eager attention, layout [B, T]) routes the blocks in `routers` by masks."""
    blocks = blocks_of(base)
    for index, router in routers.items():
        blocks[index].forward = types.MethodType(
            _masked(type(blocks[index]), router, layout, keep, gate), blocks[index]
        )
    try:
        yield
    finally:
        for index in routers:
            del blocks[index].forward


def masked_logits(base: nn.Module, routers: dict[int, Tensor], ids: Tensor, layout: Tensor, keep: float, gate: str):
    """Logits [B, T, V] of `base`, routed by masks."""
    base.set_attn_implementation("eager")
    with masked_routing(base, routers, layout, keep, gate):
        return base(input_ids=ids).logits


def _masked(cls: type, router: Tensor, layout: Tensor, keep: float, gate: str):
    names = list(signature(cls.forward).parameters)[1:]

    def forward(self, *args, **kwargs):
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        x = bound["hidden_states"]
        scores = x.float() @ router.float()
        kept = torch.zeros(x.shape[:2], dtype=torch.bool)
        for row in range(len(x)):
            kept[row, _kept(scores[row], layout[row], keep, False)] = True
        mask = bound["attention_mask"]
        bound["attention_mask"] = mask.masked_fill(~kept[:, None, None, :], torch.finfo(mask.dtype).min)
        output = cls.forward(self, **bound)
        y = output[0] if isinstance(output, tuple) else output
        weight = torch.where(layout >= 0, torch.as_tensor(_gate(scores, gate)), 1.0) * kept
        merged = x + weight[..., None] * (y - x)
        return (merged, *output[1:]) if isinstance(output, tuple) else merged

    return forward
