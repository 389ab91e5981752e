"""Compute the output head in fp32 for half-precision models, so that ties break identically in training, scoring,
answering and streaming.

A head in half precision rounds its logits (bf16: to 8 bits, steps of 0.0625 at 8), so that words of different logits
tie, and a tie falls as rounding elsewhere has it. Products of two numbers of half precision are exact in fp32; only the
rounding at the end is left out here.

Shapes: B samples, T tokens, P positions, D width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

HALF = (torch.bfloat16, torch.float16)
SLICE = 256
"""Rows of a head that are widened at a time where no kernel sums in fp32 by itself: as many as fit a core's cache."""


@contextmanager
def head_only_at(llm: PreTrainedModel, rows: Tensor, cols: Tensor) -> Iterator[None]:
    """While open, the LM head of `llm` sees the hidden states at `[rows, cols]` only, so logits are [P, V]; in fp32
    even where the head is a linear layer in half precision.

    Hooks on the head instead of a call of the inner model, because what a causal LM does after its head (soft caps,
    logit scales) stays its own business. With a vocabulary of 128k the head is the largest tensor of a step.
    """
    head: nn.Module = llm.get_output_embeddings()
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden_PD = args[0][rows, cols]
        if _dtype(module, hidden_PD) not in HALF:
            return (hidden_PD,)
        taken.append(hidden_PD)
        return (hidden_PD[:0],)

    def replace(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return fp32_linear(taken.pop(), module.weight, module.bias) if taken else None

    # first of all hooks, so that others (a trace) see what comes out
    handles = [head.register_forward_pre_hook(take), head.register_forward_hook(replace, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dtype(head: nn.Module, hidden: Tensor) -> torch.dtype | None:
    """The dtype a plain linear layer computes in; None: a module that does something else (adapters, quantised or
    offloaded weights), whose output stays as it is."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype if hidden.dtype == head.weight.dtype else None


def fp32_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of half precision without its last rounding. Under autocast, of what autocast makes of the inputs.

    Args:
        x: [P, D], bfloat16 or float16.
        weight: [V, D], of the same dtype.
        bias: [V].

    Returns:
        FloatTensor [P, V]; gradients are those of `linear`.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, weight))
    with torch.autocast(device, enabled=False):
        product: Tensor = _Product.apply(x, weight)
        return product if bias is None else product + bias.float()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(x_PD, weight_VD)
        if x_PD.is_cuda and len(x_PD):
            return torch.mm(x_PD, weight_VD.t(), out_dtype=torch.float32)
        out_PV = x_PD.new_empty(len(x_PD), len(weight_VD), dtype=torch.float32)
        wide_PD = x_PD.float()
        for start in range(0, len(weight_VD), SLICE):
            part = slice(start, start + SLICE)
            torch.mm(wide_PD, weight_VD[part].float().t(), out=out_PV[:, part])
        return out_PV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_PD, weight_VD = ctx.saved_tensors
        grad_PV = grads[0].to(weight_VD.dtype)
        wants_x, wants_weight = ctx.needs_input_grad
        return (
            F.linear(grad_PV, weight_VD.t()) if wants_x else None,
            F.linear(grad_PV.t(), x_PD.t()) if wants_weight else None,
        )
