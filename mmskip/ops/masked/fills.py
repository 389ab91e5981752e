"""Neighbour padding: what a convolution sees where nothing is kept.

`dense` works round by round on the full map and is differentiable in the activations and in the mask. `gathered_`
writes the same values to the positions that are filled and touches no others: with most of a map kept, or with holes
wider than a window, these are few. Shapes: B samples, C channels, H and W positions, R = B H W rows of activations.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmskip.ops.masked.state import EPS, Mask, box_sum
from mmskip.ops.masked.tensor import may_overwrite

FEW_CHANNELS = 16
"""With fewer, listing the positions costs more than the dense way."""


def fill_hidden(
    x_BCHW: Tensor, mask: Mask, steps: int, reach: int, gather: bool = True, gradient: bool = True
) -> Tensor:
    """The activations after `steps` rounds of neighbour padding, zero where the rounds do not come; positions farther
    than `reach` from anything kept hold anything. May overwrite what x holds under the mask.

    Args:
        reach: how far from a kept position the convolution looks.
        gather: the mask holds 0 and 1 only, so the positions to fill can be listed.
        gradient: let gradients flow through the values filled in.
    """
    last = torch.channels_last
    cpu, few = x_BCHW.device.type == "cpu", x_BCHW.shape[1] < FEW_CHANNELS
    # the layout pays on a CPU, for the convolution too; elsewhere the activations stay as the user has laid them out
    rows = cpu or x_BCHW.is_contiguous(memory_format=last)
    if few or not gather or not rows or torch.is_grad_enabled():
        x_BCHW = dense(x_BCHW.contiguous() if cpu and few else x_BCHW, mask, steps, gradient)
        return x_BCHW.contiguous(memory_format=last) if cpu else x_BCHW
    if not (may_overwrite(x_BCHW) and x_BCHW.is_contiguous(memory_format=last)):
        x_BCHW = x_BCHW.clone(memory_format=last)
    if steps < reach:
        x_BCHW.mul_(mask.to(x_BCHW.dtype))
    return gathered_(x_BCHW, mask, steps)


def dense(x_BCHW: Tensor, mask: Mask, steps: int, gradient: bool = True) -> Tensor:
    """`fill_hidden`, by box sums over the full map; zero wherever the rounds do not come."""
    x_BCHW = x_BCHW * mask.to(x_BCHW.dtype)
    for weight in mask.fills(steps, x_BCHW.dtype):
        x_BCHW = torch.addcmul(x_BCHW, box_sum(x_BCHW if gradient else x_BCHW.detach()), weight)
    return x_BCHW


def gathered_(x_BCHW: Tensor, mask: Mask, steps: int) -> Tensor:
    """`fill_hidden` in place, for dense channels-last activations without a gradient; the rest stays."""
    x_RC = x_BCHW.permute(0, 2, 3, 1).view(-1, x_BCHW.shape[1])
    for r in mask.once(("rounds", steps, x_RC.dtype), lambda: rounds(mask, steps, x_RC.dtype)):
        means = F.embedding_bag(r.sources_N, x_RC, r.offsets_P, mode="sum", per_sample_weights=r.weights_N)
        x_RC.index_copy_(0, r.rows_P, means)
    return x_BCHW


@dataclass(frozen=True)
class Round:
    """One round: P rows are filled from N rows.

    Attributes:
        rows_P: the rows of the positions to fill.
        sources_N: the rows of their neighbours that are kept or filled already, one position after the other.
        offsets_P: where the neighbours of each position begin.
        weights_N: 1 / (neighbours of the position + eps).
    """

    rows_P: Tensor
    sources_N: Tensor
    offsets_P: Tensor
    weights_N: Tensor


def rounds(mask: Mask, steps: int, dtype: torch.dtype) -> list[Round]:
    """Return the rounds of neighbour padding of a mask of 0 and 1. Fewer than `steps` where nothing is left to fill."""
    base, (left, right, top, bottom) = (mask, (0, 0, 0, 0)) if mask.base is None else (mask.base, mask.pads)
    (b, _, _, w), (high, wide), device = base.m.shape, mask.size, mask.m.device
    # a ring around each map gives every position eight neighbours; no position of the ring is kept or filled
    ring = (1, 1, 1, 1)
    rows = torch.arange(b * high * wide, device=device).reshape(b, high, wide)
    rows = F.pad(rows[:, top : high - bottom, left : wide - right], ring).flatten()
    known = F.pad(base.m[:, 0] > 0, ring).flatten()
    open_ = F.pad(base.m[:, 0] == 0, ring).flatten().nonzero()[:, 0]
    step = w + 2
    around = torch.tensor([-step - 1, -step, -step + 1, -1, 1, step - 1, step, step + 1], device=device)
    found = []
    for _ in range(steps):
        near = open_[:, None] + around
        seen = known[near]
        counts = seen.sum(1)
        now = counts > 0
        spots, counts = open_[now], counts[now]
        if not len(spots):
            break
        weights = (1 / (counts.double() + EPS)).to(dtype).repeat_interleave(counts)
        found.append(Round(rows[spots], rows[near[seen]], counts.cumsum(0) - counts, weights))
        known[spots] = True
        open_ = open_[~now]
    return found
