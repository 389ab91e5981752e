"""Roll a cache back: cut what was not accepted, and keep every row right-aligned.

Shape suffixes: B rows, S slots of the cache, H heads, E head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmskip.hf.speculation.tree import kept_slots


def cut(cache: Any, slots: int) -> None:
    """Drop what the cache holds after `slots`."""
    for layer in cache.layers:
        if layer.is_initialized and layer.keys.shape[-2] > slots:
            layer.keys, layer.values = layer.keys[..., :slots, :], layer.values[..., :slots, :]


def keep(cache: Any, mask_BS: Tensor, places: Sequence[Sequence[int]], before: int) -> Tensor:
    """Keep, of the slots after a pass, those of each row's places, right-aligned, and drop slots empty in all rows.

    Args:
        mask_BS: which slots hold a token of the row, those of the pass included.
        places: of the pass, by row.
        before: slots of the cache before the pass.

    Returns:
        The mask of the slots that are left.
    """
    most = max(map(len, places))
    slots = before + most
    # what moves: nothing for equal chains, the new slots alone where all rows keep as many
    chains = all(row == list(range(most)) for row in places)
    first = before if all(len(row) == most for row in places) else 0
    from_BS = None if chains else kept_slots(places, before)[:, first:].to(mask_BS.device)
    index_BS = None
    if from_BS is not None:
        index_BS = from_BS.clamp(min=0)
        moved = mask_BS.gather(1, index_BS) * (from_BS >= 0)
        mask_BS = torch.cat([mask_BS[:, :first], moved], 1)
    mask_BS = mask_BS[:, :slots]
    empty = int(mask_BS.amax(0).argmax())
    for layer in cache.layers:
        for name in ("keys", "values"):
            stored_BHSE = getattr(layer, name)
            if index_BS is not None:
                stored_BHSE = _moved(stored_BHSE, index_BS, first)
            setattr(layer, name, stored_BHSE[..., empty:slots, :])
    return mask_BS[:, empty:]


def _moved(stored_BHSE: Tensor, index_BS: Tensor, first: int) -> Tensor:
    """Gather each row's slots by an index, from slot `first` on."""
    index = index_BS[:, None, :, None].expand(-1, stored_BHSE.shape[1], -1, stored_BHSE.shape[3])
    moved = stored_BHSE.gather(2, index)
    if not first:
        return moved
    # into slots of this pass, which nothing else looks at
    stored_BHSE[..., first : first + index_BS.shape[1], :] = moved
    return stored_BHSE
