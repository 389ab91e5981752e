"""Token scores without parameters: norm, random, uniform.

Shape suffixes: B batch, T tokens, D width, G groups of the batch, N tokens of the largest group, S slots of
the largest row after selection.
"""

import torch
from torch import Tensor

from mmskip.tokens.groups import TokenGroups


def norm_scores(x_BTD: Tensor) -> Tensor:
    """Score tokens by their L2 norm in fp32, [B, T]."""
    return x_BTD.float().norm(dim=-1)


def random_scores(groups: TokenGroups, seed: int, training: bool) -> Tensor:
    """Score tokens at random, [B, T]: the control.

    Args:
        seed: of the evaluation scores, >= 0.
        training: draw fresh scores; else hash frame id and index in the frame, so that chunked, padded and cached runs
            select the same tokens.
    """
    batch, length = groups.shape
    if training:
        return torch.rand(batch, length, device=groups.layout_BT.device)
    rank = torch.zeros(batch * length + 1, dtype=torch.long, device=groups.layout_BT.device)
    if groups.has_vision:
        ranks_N = torch.arange(groups.table_GN.shape[1], device=rank.device)
        rank.scatter_(0, groups.table_GN.reshape(-1), ranks_N.repeat(groups.table_GN.shape[0]))
    mixed = groups.layout_BT * 40503 + rank[:-1].view(batch, length) * 30011 + seed * 7919 + 1
    for multiplier in (48271, 69621, 39373):
        mixed = (mixed * multiplier) % 2147483647
        mixed = mixed ^ (mixed >> 11)
    return mixed.float()


def uniform_scores(groups: TokenGroups, keep: float) -> Tensor:
    """Score k evenly spaced tokens of each group 1, all others 0: the control. [B, T].

    Args:
        keep: ratio in (0, 1], k = max(1, round(keep * n)) per group.
    """
    batch, length = groups.shape
    scores = torch.zeros(batch * length + 1, device=groups.layout_BT.device)
    if groups.has_vision:
        sizes = (groups.table_GN < batch * length).sum(1, keepdim=True)
        k = groups.budget(keep).k_G[:, None]
        rank = torch.arange(groups.table_GN.shape[1], device=scores.device)
        # the rank in the middle of each of k equal parts of the group
        even = (((2 * rank + 2) * k + sizes) // (2 * sizes)) > (((2 * rank) * k + sizes) // (2 * sizes))
        scores.scatter_(0, groups.table_GN.reshape(-1), even.float().reshape(-1))
    return scores[:-1].view(batch, length)
