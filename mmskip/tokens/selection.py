"""Select the tokens of a call that a layer processes.

Shape suffixes: B batch, T tokens, D width, G groups of the batch, N tokens of the largest group, S slots of
the largest row after selection.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmskip.tokens.groups import TEXT, Budget, TokenGroups


@dataclass
class Selection:
    """The tokens a layer processes.

    Attributes:
        index_BS: LongTensor [B, S], kept positions of each row, ascending; padding slots repeat the last.
        valid_BS: BoolTensor [B, S], False on padding slots; None when all rows keep S tokens.
        keep_BT: BoolTensor [B, T], True on kept tokens.
        kept_G: tokens kept of each group, on the host, [G]; None where the method does not know. Streams need it.
        kept_B: tokens kept of each row, on the host, [B]; None as above. Packed attention waits for the device then.
    """

    index_BS: Tensor
    valid_BS: Tensor | None
    keep_BT: Tensor
    kept_G: np.ndarray | None = None
    kept_B: np.ndarray | None = None

    def to(self, device: torch.device) -> "Selection":
        """Return the same selection on `device`."""
        valid = None if self.valid_BS is None else self.valid_BS.to(device)
        return replace(self, index_BS=self.index_BS.to(device), valid_BS=valid, keep_BT=self.keep_BT.to(device))


def select(scores_BT: Tensor, groups: TokenGroups, keep: float, force_last: bool = False) -> Selection:
    """Select the k highest-scoring tokens of each group and all text, ties to the lower index, with no device sync.

    Args:
        scores_BT: float tensor [B, T]; only the scores of group tokens are read.
        keep: ratio in (0, 1], k = max(1, round(keep * n)) per group.
        force_last: the last token of each group is one of the k.
    """
    batch, length = groups.shape
    budget = groups.budget(keep)
    keep_flat = scores_BT.new_zeros(batch * length + 1, dtype=torch.bool)
    text_BT = groups.layout_BT == TEXT
    if groups.real_BT is not None and budget.slots < length:
        text_BT = text_BT & groups.real_BT
    keep_flat[:-1] = text_BT.reshape(-1)
    if groups.has_vision:
        keep_flat.scatter_(0, _chosen(scores_BT, groups, budget, force_last).reshape(-1), True)
    keep_BT = keep_flat[:-1].view(batch, length)
    return replace(compact(keep_BT, budget.slots, budget.rows_B), kept_G=budget.host_G, kept_B=budget.host_B)


def _chosen(scores_BT: Tensor, groups: TokenGroups, budget: Budget, force_last: bool) -> Tensor:
    """Return flat positions [G, k_max] of the chosen tokens; unused entries hold B * T."""
    outside = groups.table_GN.new_tensor(scores_BT.numel())
    scores_GN = scores_BT.reshape(-1)[groups.table_GN.clamp(max=scores_BT.numel() - 1)]
    unused_GN = groups.table_GN == outside
    if force_last:
        scores_GN = scores_GN.masked_fill(groups.last_GN, torch.inf)
    scores_GN = scores_GN.masked_fill(unused_GN, -torch.inf)
    order_GN = torch.sort(scores_GN, dim=1, descending=True, stable=True).indices[:, : budget.k_max]
    chosen_GK = groups.table_GN.gather(1, order_GN)
    taken_GK = torch.arange(budget.k_max, device=chosen_GK.device) < budget.k_G[:, None]
    return torch.where(taken_GK, chosen_GK, outside)


def compact(keep_BT: Tensor, slots: int, rows_B: Tensor | None) -> Selection:
    """Turn a keep mask into ascending indices.

    Args:
        keep_BT: BoolTensor [B, T].
        slots: S, tokens kept of the fullest row.
        rows_B: LongTensor [B], tokens kept of each row; None: all keep S.
    """
    batch, length = keep_BT.shape
    positions_BT = torch.arange(length, device=keep_BT.device).expand(batch, length)
    slot_BT = torch.where(keep_BT, keep_BT.cumsum(1) - 1, slots)
    index_BS = positions_BT.new_zeros(batch, slots + 1).scatter_(1, slot_BT, positions_BT)[:, :slots]
    if rows_B is None:
        return Selection(index_BS, None, keep_BT)
    slot_S = torch.arange(slots, device=keep_BT.device)
    index_BS = index_BS.gather(1, torch.minimum(slot_S, (rows_B[:, None] - 1).clamp(min=0)))
    return Selection(index_BS, slot_S < rows_B[:, None], keep_BT)
