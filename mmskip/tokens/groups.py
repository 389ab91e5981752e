"""Groups of vision tokens (frames, images) in a call, and how many of each a layer keeps.

Shape suffixes: B batch, T tokens, D width, G groups of the batch, N tokens of the largest group, S slots of
the largest row after selection.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

TEXT = -1
"""Layout value of a token that belongs to no group."""


PADDING = -2
"""Value of padding in `TokenGroups.host_BT`."""


ATTENTION_SCORES = "attention scores"
"""Key in `TokenGroups.shared` of the attention [B, T] that text pays to each token in a probed block."""


@dataclass(frozen=True)
class Budget:
    """Numbers of tokens of a forward that a layer keeps at one keep ratio.

    Attributes:
        k_G: LongTensor [G], tokens kept of each group.
        k_max: largest of `k_G`, on the host.
        slots: S, tokens kept of the fullest row, on the host.
        rows_B: LongTensor [B], tokens kept of each row; None where all rows keep S.
        host_G: `k_G` on the host.
        host_B: tokens kept of each row, on the host, [B].
    """

    k_G: Tensor
    k_max: int
    slots: int
    rows_B: Tensor | None
    host_G: np.ndarray
    host_B: np.ndarray


@dataclass
class TokenGroups:
    """The groups of one batch, read from its layout once per forward.

    Attributes:
        layout_BT: LongTensor [B, T], group id of a vision token, -1 for text and padding.
        real_BT: BoolTensor [B, T], False on padding; None when there is no padding.
        table_GN: LongTensor [G, N], flat positions b * T + t of each group's tokens in order; unused
            entries hold B * T.
        last_GN: BoolTensor [G, N], the last token of each group.
        sizes: tokens per group, on the host, [G].
        group_rows: batch row of each group, on the host, [G].
        row_lengths: real tokens per row, on the host, [B].
        start: number of tokens that came before this forward (of a cached stream).
        host_BT: the layout on the host, [B, T], with `PADDING` on padding.
        prompt: tokens of the prompt of `generate`, cached ones included; None outside of it.
        shared: values that blocks of one forward leave for later blocks, by name; common to all copies.
    """

    layout_BT: Tensor
    real_BT: Tensor | None
    table_GN: Tensor
    last_GN: Tensor
    sizes: np.ndarray
    group_rows: np.ndarray
    row_lengths: np.ndarray
    start: int = 0
    host_BT: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    prompt: int | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    _budgets: dict[float, Budget] = field(default_factory=dict)
    _copies: dict[torch.device, "TokenGroups"] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)"""
        return self.layout_BT.shape[0], self.layout_BT.shape[1]

    @property
    def has_vision(self) -> bool:
        """Whether any token of the batch belongs to a group."""
        return len(self.sizes) > 0

    def budget(self, keep: float) -> Budget:
        """Count the tokens to keep: k = max(1, round(keep * n)) of a group's n tokens, and all text. Counted once per
        forward and ratio, on the host.

        Args:
            keep: ratio in (0, 1].
        """
        if keep not in self._budgets:
            self._budgets[keep] = self._count(keep)
        return self._budgets[keep]

    def _count(self, keep: float) -> Budget:
        k = np.maximum(1, np.rint(keep * self.sizes)).astype(np.int64)
        batch, length = self.shape
        skipped = np.zeros(batch, np.int64)
        np.add.at(skipped, self.group_rows, self.sizes - k)
        rows = self.row_lengths - skipped
        slots = int(rows.max(initial=0))
        if slots == length:
            # dropping padding would save nothing, and keeping it makes the call the same as the base model's
            rows = length - skipped
        device = self.layout_BT.device
        rows_B = torch.from_numpy(rows).to(device) if bool((rows != slots).any()) else None
        return Budget(torch.from_numpy(k).to(device), int(k.max(initial=0)), slots, rows_B, k, rows)

    def to(self, device: torch.device) -> "TokenGroups":
        """Return the same groups with tensors on `device`; copied once per device (models spread over several)."""
        if self.layout_BT.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = TokenGroups(
                self.layout_BT.to(device),
                None if self.real_BT is None else self.real_BT.to(device),
                self.table_GN.to(device),
                self.last_GN.to(device),
                self.sizes,
                self.group_rows,
                self.row_lengths,
                self.start,
                self.host_BT,
                self.prompt,
                self.shared,
            )
        return self._copies[device]


def token_groups(layout_BT: Tensor, real_BT: Tensor | None = None, start: int = 0) -> TokenGroups:
    """Read a layout. This waits for the device: once per forward, before the layers run.

    Args:
        layout_BT: integer tensor [B, T]: group (frame) id >= 0 of a vision token, -1 for text. Ids need only
            differ between the groups of a row; the tokens of a group need not be adjacent.
        real_BT: tensor [B, T], nonzero on real tokens, zero on padding; None: no padding.
        start: tokens already in the cache.

    Raises:
        ValueError: wrong rank, dtype or values.
    """
    if layout_BT.dim() != 2 or layout_BT.is_floating_point() or layout_BT.dtype == torch.bool:
        raise ValueError(
            f"layout has shape {tuple(layout_BT.shape)} and dtype {layout_BT.dtype}; expected an integer tensor "
            "[batch, tokens] holding the frame id of each vision token and -1 for text."
        )
    layout = layout_BT.cpu().numpy()
    if layout.size and layout.min() < TEXT:
        raise ValueError(f"layout holds {int(layout.min())}; expected frame ids >= 0 and -1 for text.")
    batch, length = layout.shape
    real = None
    if real_BT is not None:
        real_np = real_BT.cpu().numpy().astype(bool)
        if not real_np.all():
            real = real_BT.to(layout_BT.device, torch.bool)
            layout = np.where(real_np, layout, TEXT)
            layout_BT = torch.from_numpy(layout).to(layout_BT.device)
    row_lengths = np.full(batch, length) if real is None else real_np.sum(1)
    host = layout.astype(np.int64) if real is None else np.where(real_np, layout, PADDING)
    table, sizes, group_rows = group_table(layout)
    last = np.arange(table.shape[1])[None] == sizes[:, None] - 1
    device = layout_BT.device
    return TokenGroups(
        layout_BT.long(),
        real,
        torch.from_numpy(table).to(device),
        torch.from_numpy(last).to(device),
        sizes,
        group_rows,
        row_lengths.astype(np.int64),
        start,
        host,
    )


def group_table(layout: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the table [G, N] of a layout [B, T], see `TokenGroups.table_GN`, with sizes [G] and batch rows [G]."""
    batch, length = layout.shape
    flat = layout.reshape(-1)
    positions = np.flatnonzero(flat != TEXT)
    if len(positions) == 0:
        return np.zeros((0, 1), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = positions // length
    pairs = np.stack([rows, flat[positions]])
    unique, group, sizes = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.arange(len(order)) - np.repeat(first, sizes)
    table = np.full((len(sizes), int(sizes.max())), batch * length, np.int64)
    table[group[order], rank] = positions[order]
    return table, sizes.astype(np.int64), unique[0].astype(np.int64)
