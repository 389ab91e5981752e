"""The voids of LAC (arXiv 2505.14467): blocks that add little to a token.

Shape suffixes: B batch, T tokens.
"""

import torch
from torch import Tensor

LAC_ALPHA = 0.8
"""Share of the range of growths below which a block is a void, as published."""


def lac_voids(
    grown_BT: Tensor, range_BT: tuple[Tensor, Tensor] | None, alpha: float = LAC_ALPHA
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Find the voids at one block: tokens whose norm grows by less than alpha times the range of its growths at the
    earlier blocks. The first block has none.

    Args:
        grown_BT: growth of the norm of each token.
        range_BT: largest and smallest growth at the earlier blocks; None at the first one.

    Returns:
        BoolTensor [B, T], and the range for the next block.
    """
    spread_BT, seen = growth_spread(grown_BT, range_BT)
    if spread_BT is None:
        return torch.zeros_like(grown_BT, dtype=torch.bool), seen
    return grown_BT < alpha * spread_BT, seen


def growth_spread(
    grown_BT: Tensor, range_BT: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """Return the spread (largest minus smallest) of the growths at the earlier blocks, None at the first block and 0 at
    the second, and the range for the next block. Arguments as `lac_voids`."""
    if range_BT is None:
        return None, (grown_BT, grown_BT)
    high_BT, low_BT = range_BT
    return high_BT - low_BT, (torch.maximum(high_BT, grown_BT), torch.minimum(low_BT, grown_BT))
