"""The frames that a cached stream has seen: each must arrive in one call, since its best tokens are chosen together.

Shape suffixes: B batch, F frames of the row with most (other rows are padded with id -1), N new frames.
"""

import numpy as np
import torch
from torch import Tensor

from mmskip.tokens.groups import TEXT, TokenGroups


def frames_of(groups: TokenGroups) -> Tensor | None:
    """Return id, first slot and end of every frame of a call, [B, N, 3] on its device; None without vision."""
    if not groups.has_vision:
        return None
    rows = []
    for row in groups.host_BT:
        ids, first = np.unique(row, return_index=True)
        end = len(row) - np.unique(row[::-1], return_index=True)[1]
        known = ids >= 0
        rows.append(np.stack([ids, first + groups.start, end + groups.start], 1)[known])
    frames_BN3 = np.full((len(rows), max(map(len, rows)), 3), TEXT, np.int64)
    for row, frames in enumerate(rows):
        frames_BN3[row, : len(frames)] = frames
    return torch.from_numpy(frames_BN3).to(groups.layout_BT.device)


def seen_after(seen_BF3: Tensor | None, new_BN3: Tensor | None) -> Tensor | None:
    """Return the frames seen after a call, [B, F + N, 3].

    Raises:
        ValueError: a frame of the call was seen before.
    """
    if seen_BF3 is None or new_BN3 is None:
        return new_BN3 if seen_BF3 is None else seen_BF3
    seen_BF3 = seen_BF3.to(new_BN3.device)
    again = (seen_BF3[:, None, :, 0] == new_BN3[:, :, None, 0]) & (new_BN3[:, :, None, 0] != TEXT)
    found = again.any(-1).nonzero()
    if len(found):
        row, frame = found[0].tolist()
        raise ValueError(
            f"frame {int(new_BN3[row, frame, 0])} of row {row} continues from an earlier call; pass all tokens of a "
            "frame in one call (in generate: prefill_chunk_size=None), and give each frame of a row its own id."
        )
    return torch.cat([seen_BF3, new_BN3], 1)


def seen_before(seen_BF3: Tensor, total: int) -> Tensor:
    """Return the frames that the first `total` tokens hold, [B, F, 3]."""
    gone = seen_BF3[..., 1] >= total
    return seen_BF3.masked_fill(gone[..., None], TEXT)


def check_not_cut(seen_BF3: Tensor, total: int) -> None:
    """Raise ValueError if a stream was cropped to `total` tokens within a frame."""
    cut = (seen_BF3[..., 2] > total).nonzero()
    if len(cut):
        row, frame = cut[0].tolist()
        name, first, end = seen_BF3[row, frame].tolist()
        raise ValueError(
            f"the cache was cropped to {total} tokens, within frame {name} of row {row} (tokens {first} to {end - 1}), "
            f"whose best tokens were chosen together. Crop to {first} or less and pass the frame again."
        )
