"""Bipartite soft matching: which tokens of a group are merged into which (ToMe, arXiv 2210.09461).

In each round the tokens that are left in a group are split by turns into two halves; every token of the first half
looks for its most similar one in the second, and the most similar pairs are merged until the group has the wanted
number of tokens. A merged token is the mean of all it stands for, at the place of the second half's token.

Shape suffixes: G groups, N tokens of the largest group, D width.
"""

import numpy as np
import torch
from torch import Tensor


def match_similar(x_GND: Tensor, sizes: np.ndarray, keep: np.ndarray, keep_last: bool = False) -> Tensor:
    """Return the token that each token is merged into.

    Args:
        x_GND: tokens of each group, in order; entries after a group's size are not read.
        sizes: tokens per group [G], on the host.
        keep: tokens left per group [G], on the host, 1 to its size.
        keep_last: the last token of each group is never merged into another one.

    Returns:
        LongTensor [G, N]: the place in the group of the token that represents it; itself where it is kept.
    """
    groups, longest = x_GND.shape[:2]
    device = x_GND.device
    owner_GN = torch.arange(longest, device=device).repeat(groups, 1)
    mean_GND = x_GND.float()
    weight_GN = torch.ones(groups, longest, device=device)
    alive_GN = owner_GN < torch.from_numpy(sizes).to(device)[:, None]
    movable_GN = owner_GN < torch.from_numpy(sizes - keep_last).to(device)[:, None]
    left = sizes.copy()
    while (left > keep).any():
        merged = np.minimum(left - keep, left // 2)
        into_GN = _round(mean_GND, alive_GN, movable_GN, torch.from_numpy(merged).to(device))
        gone_GN = into_GN != torch.arange(longest, device=device)
        sums_GND = torch.zeros_like(mean_GND).scatter_add_(
            1, into_GN[..., None].expand_as(mean_GND), mean_GND * weight_GN[..., None]
        )
        weight_GN = torch.zeros_like(weight_GN).scatter_add_(1, into_GN, weight_GN)
        mean_GND = sums_GND / weight_GN.clamp(min=1)[..., None]
        owner_GN = into_GN.gather(1, owner_GN)
        alive_GN = alive_GN & ~gone_GN
        left = left - merged
    return owner_GN


def _round(x_GND: Tensor, alive_GN: Tensor, movable_GN: Tensor, merged_G: Tensor) -> Tensor:
    """One round: [G, N], where each token goes."""
    longest = x_GND.shape[1]
    turn_GN = alive_GN.cumsum(1) % 2
    first_GN, second_GN = alive_GN & movable_GN & (turn_GN == 1), alive_GN & (turn_GN == 0)
    unit_GND = x_GND / x_GND.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    alike_GNN = (unit_GND @ unit_GND.mT).masked_fill(~second_GN[:, None, :], -torch.inf)
    best_GN, partner_GN = alike_GNN.max(-1)
    best_GN = best_GN.masked_fill(~first_GN, -torch.inf)
    rank_GN = best_GN.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    stays = torch.arange(longest, device=x_GND.device)
    return torch.where((rank_GN < merged_G[:, None]) & first_GN, partner_GN, stays)


def match_similar_naive(x_ND: Tensor, keep: int, keep_last: bool = False) -> list[int]:
    """Reference of `match_similar` for one group: Python loops."""
    clusters = {place: [place] for place in range(len(x_ND))}
    while len(clusters) > keep:
        places = sorted(clusters)
        means = {p: torch.stack([x_ND[m].float() for m in clusters[p]]).mean(0) for p in places}
        pairs = []
        for a in places[0::2]:
            if keep_last and a == len(x_ND) - 1:
                continue
            alike = [(float(torch.cosine_similarity(means[a], means[b], dim=0)), -b) for b in places[1::2]]
            if alike:
                best, b = max(alike)
                pairs.append((-best, a, -b))
        for _, a, b in sorted(pairs)[: min(len(clusters) - keep, len(clusters) // 2)]:
            clusters[b] += clusters.pop(a)
    return [next(p for p, members in clusters.items() if place in members) for place in range(len(x_ND))]
