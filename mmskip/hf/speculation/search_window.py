"""The generated tokens that draft sets are compared on, with the cache before them.

Shape suffixes: B rows, W tokens of the window, S slots of the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmskip.hf.speculation.rows import Rows


@dataclass
class SearchWindow:
    """Tokens that sets of parts are compared on.

    Attributes:
        layers: keys and values before the window, by block: views, no copies.
        ids_BW: the tokens of the window.
        targets_BW: the token that followed each.
        mask_BS: which slots hold a token of the row, those of the window included.
        rows: indices of the rows that count.
    """

    layers: list[tuple[Tensor, Tensor]]
    ids_BW: Tensor
    targets_BW: Tensor
    mask_BS: Tensor
    rows: list[int]

    def matchness(self, forward: Callable[[Tensor, Tensor, Any], Tensor]) -> float:
        """Measure the share of the window's tokens that a draft would have chosen.

        Args:
            forward: (ids, mask, cache) -> logits of the draft.
        """
        cache = DynamicCache()
        for keys, values in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        logits = forward(self.ids_BW, self.mask_BS, cache)
        same_BW = logits[:, -self.ids_BW.shape[1] :].argmax(-1) == self.targets_BW
        return float(same_BW[self.rows].float().mean())


def open_window(rows: Rows, width: int, mask_BS: Tensor, cache: Any) -> SearchWindow | None:
    """Take the last `width` generated tokens of the rows under way; None while one of them has fewer."""
    long = [row for row, done in enumerate(rows.done) if not done and rows.counts[row] > width]
    if len(long) < rows.done.count(False) or not long:
        return None
    slots = mask_BS.shape[1]
    index_BW = rows.ends()[:, None] - width - 1 + torch.arange(width + 1, device=mask_BS.device)[None]
    ids = rows.tokens_BN.gather(1, index_BW.clamp(min=0))
    layers = [(e.keys[..., : slots - width, :], e.values[..., : slots - width, :]) for e in cache.layers]
    return SearchWindow(layers, ids[:, :-1], ids[:, 1:], mask_BS, long)
