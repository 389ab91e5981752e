"""Token routers: which tokens of each group (frame) a layer processes. Shared by every token-routing method.

Shape suffixes: B batch, T tokens, D width, G groups of the batch, N tokens of the largest group, S slots of
the largest row after selection.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT = -1
"""The layout value of a token that belongs to no group."""

PADDING = -2
"""What stands for padding in `TokenGroups.host_BT`."""

ATTENTION_SCORES = "attention scores"
"""Name in `TokenGroups.shared` of the attention [B, T] that text pays to each token in a probed block."""

ROUTERS = ("linear", "mlp", "norm", "random", "uniform")
LEARNED = ("linear", "mlp")
"""Routers with weights."""
GATES = ("linear", "sigmoid", "tanh", "own", "none")


@dataclass(frozen=True)
class Budget:
    """How many tokens of a forward a layer keeps at one keep ratio.

    Attributes:
        k_G: LongTensor [G], tokens kept of each group; `k_max` the largest, on the host.
        slots: S, tokens kept of the fullest row, on the host.
        rows_B: LongTensor [B], tokens kept of each row where rows differ; None where all keep S.
        host_G, host_B: k_G, and the tokens kept of each row, on the host.
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
        host_BT: the layout on the host, [B, T], with `PADDING` where there is no token.
        prompt: tokens of the stream that `generate` was given; None outside of it.
        shared: what blocks of one forward hand on to later ones, by name; common to all copies.
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
        """Counts at a keep ratio: k = max(1, round(keep * n)) of a group's n tokens, every text token. Counted once
        per forward and ratio, on the host."""
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
            # leaving padding out would save nothing, and keeping it leaves the call just as the base makes it
            rows = length - skipped
        device = self.layout_BT.device
        rows_B = torch.from_numpy(rows).to(device) if bool((rows != slots).any()) else None
        return Budget(torch.from_numpy(k).to(device), int(k.max(initial=0)), slots, rows_B, k, rows)

    def to(self, device: torch.device) -> "TokenGroups":
        """The same groups with their tensors on `device`; copied once per device (models spread over several)."""
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
    """Read a layout, which waits for the device: once per forward, before the layers run.

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
    table, sizes, group_rows = _group_table(layout)
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


def _group_table(layout: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


@dataclass
class Selection:
    """The tokens a layer processes.

    Attributes:
        index_BS: LongTensor [B, S], kept positions of each row, ascending; padding slots repeat the last.
        valid_BS: BoolTensor [B, S], False on padding slots; None when all rows keep S tokens.
        keep_BT: BoolTensor [B, T], True on kept tokens.
        kept_G: tokens kept of each group, on the host, [G]; None where the method does not say. Streams need it.
        kept_B: tokens kept of each row, on the host, [B]; None likewise. Packed attention waits for the device without.
    """

    index_BS: Tensor
    valid_BS: Tensor | None
    keep_BT: Tensor
    kept_G: np.ndarray | None = None
    kept_B: np.ndarray | None = None

    def to(self, device: torch.device) -> "Selection":
        """The same selection on `device`."""
        valid = None if self.valid_BS is None else self.valid_BS.to(device)
        return replace(self, index_BS=self.index_BS.to(device), valid_BS=valid, keep_BT=self.keep_BT.to(device))


def select(scores_BT: Tensor, groups: TokenGroups, keep: float, force_last: bool = False) -> Selection:
    """The k highest-scoring tokens of each group and all text, ties to the lower index, with no device sync.

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
    """Flat positions [G, k_max] of the chosen tokens; unused entries hold B * T."""
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
    """Turn a keep mask into ascending indices, given the host-known largest row (`slots`) and, where rows
    differ, their lengths `rows_B`."""
    batch, length = keep_BT.shape
    positions_BT = torch.arange(length, device=keep_BT.device).expand(batch, length)
    slot_BT = torch.where(keep_BT, keep_BT.cumsum(1) - 1, slots)
    index_BS = positions_BT.new_zeros(batch, slots + 1).scatter_(1, slot_BT, positions_BT)[:, :slots]
    if rows_B is None:
        return Selection(index_BS, None, keep_BT)
    slot_S = torch.arange(slots, device=keep_BT.device)
    index_BS = index_BS.gather(1, torch.minimum(slot_S, (rows_B[:, None] - 1).clamp(min=0)))
    return Selection(index_BS, slot_S < rows_B[:, None], keep_BT)


class TokenRouter(nn.Module):
    """The learned routers: one score per token in fp32, mu = w . x (VideoLLM-MoD, LayerExpert), or, with `hidden`
    units, mu = w . gelu(W x / rms(x) + b).

    Not made of `nn.Linear`, so that peft's `all-linear` leaves it alone.

    Args:
        width: hidden width D.
        gate: how the update of a kept token is multiplied: by mu (`linear`, the paper's), its `sigmoid`, `tanh`
            (1 + 0.2 * tanh(mu) with zero-initialised weights w: the update starts unchanged; p-MoD), `own`
            (1 + 0.2 * tanh(v . x) with weights v of its own, zero-initialised), or `none` (1).
        ranks: whether it has the weights w; False for gates beside a router without weights.
        hidden: units of the MLP; 0: the linear router.
    """

    def __init__(
        self,
        width: int,
        gate: str,
        device: Any = None,
        dtype: torch.dtype | None = None,
        ranks: bool = True,
        hidden: int = 0,
    ) -> None:
        super().__init__()
        self.width, self.gate_mode = width, gate

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.hidden_weight = weights(hidden, width) if ranks and hidden else None
        self.hidden_bias = weights(hidden) if ranks and hidden else None
        self.weight = weights(hidden or width) if ranks else None
        self.gate_weight = weights(width) if gate == "own" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros for w of `tanh` and the weights of a gate; otherwise normal with standard deviation fan-in ** -0.5, so
        that scores are of order 1."""
        if self.gate_weight is not None:
            nn.init.zeros_(self.gate_weight)
        if self.hidden_weight is not None and self.hidden_bias is not None:
            nn.init.normal_(self.hidden_weight, std=self.width**-0.5)
            nn.init.zeros_(self.hidden_bias)
        if self.weight is None:
            return
        if self.gate_mode == "tanh":
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.weight.shape[0] ** -0.5)

    def ranking_weights(self) -> dict[str, nn.Parameter]:
        """The weights that make the scores, by name."""
        named = {"weight": self.weight, "hidden_weight": self.hidden_weight, "hidden_bias": self.hidden_bias}
        return {name: value for name, value in named.items() if value is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Scores in fp32, [..., D] -> [...]."""
        return token_scores(x, self.ranking_weights())

    def gate(self, x: Tensor) -> Tensor:
        """Multipliers of the updates in fp32, [..., D] -> [...]."""
        if self.gate_weight is not None:
            return gate_of(token_scores(x, {"weight": self.gate_weight}), "tanh")
        return gate_of(self(x), self.gate_mode)

    def flops(self) -> tuple[int, int]:
        """Of a token's score, and of its gate."""
        score = 2 * sum(value.numel() for value in self.ranking_weights().values())
        if self.gate_weight is not None:
            return score, 2 * self.gate_weight.numel()
        return score, 0 if self.gate_mode == "none" else score

    def extra_repr(self) -> str:
        hidden = "" if self.hidden_weight is None else f", hidden={self.hidden_weight.shape[0]}"
        return f"width={self.width}, gate={self.gate_mode}{hidden}"


def token_scores(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The scores of a router with these `ranking_weights`, in fp32, [..., D] -> [...]."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        if "hidden_weight" in weights:
            x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
            x = F.gelu(F.linear(x, weights["hidden_weight"].float(), weights["hidden_bias"].float()))
        return x @ weights["weight"].float()


def gate_of(scores: Tensor, mode: str) -> Tensor:
    """The multiplier of a kept token's update, fp32, same shape as `scores`."""
    if mode == "linear":
        return scores
    if mode == "sigmoid":
        return torch.sigmoid(scores)
    return 1 + 0.2 * torch.tanh(scores)


def norm_scores(x_BTD: Tensor) -> Tensor:
    """The L2 norm of each token in fp32: a router without parameters."""
    return x_BTD.float().norm(dim=-1)


def random_scores(groups: TokenGroups, seed: int, training: bool) -> Tensor:
    """The control: scores [B, T] that know nothing. Fresh in training; in evaluation a hash of frame id and
    place in the frame, so that chunked, padded and cached runs select the same tokens."""
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
    """The control: k tokens at even distances in each group; scores [B, T], 1 on those, else 0."""
    batch, length = groups.shape
    scores = torch.zeros(batch * length + 1, device=groups.layout_BT.device)
    if groups.has_vision:
        sizes = (groups.table_GN < batch * length).sum(1, keepdim=True)
        k = groups.budget(keep).k_G[:, None]
        rank = torch.arange(groups.table_GN.shape[1], device=scores.device)
        # the k ranks in the middle of k equal parts of the group
        even = (((2 * rank + 2) * k + sizes) // (2 * sizes)) > (((2 * rank) * k + sizes) // (2 * sizes))
        scores.scatter_(0, groups.table_GN.reshape(-1), even.float().reshape(-1))
    return scores[:-1].view(batch, length)


@dataclass(frozen=True)
class Queries:
    """Text tokens by whose attention vision tokens are ranked, on the host.

    Attributes:
        rows_Q, slots_Q: batch row and place in this call of each query, [Q].
        query_G: which query ranks each group, [G].
        ends_G: place in this call of each group's last token, [G].
    """

    rows_Q: np.ndarray
    slots_Q: np.ndarray
    query_G: np.ndarray
    ends_G: np.ndarray


def ranking_queries(groups: TokenGroups, which: str) -> Queries:
    """The text token that ranks each group: with `which="next"` the first after the group (known as soon as that token
    is, so nothing later decides what the group keeps), with `"last"` the last of the row in this call. Text that
    `generate` appended to the prompt never ranks.

    Raises:
        ValueError: a group has no such text after it in this call.
    """
    ends = _group_ends(groups.host_BT)
    end = groups.shape[1] if groups.prompt is None else max(groups.prompt - groups.start, 0)
    slots = np.empty(len(ends), np.int64)
    for row in np.unique(groups.group_rows):
        mine = groups.group_rows == row
        text = np.flatnonzero(groups.host_BT[row, :end] == TEXT)
        after = np.searchsorted(text, ends[mine])
        if (after == len(text)).any():
            frame = int(groups.host_BT[row, ends[mine][after == len(text)][0]])
            raise ValueError(
                f"frame {frame} of row {int(row)} is followed by no text in this call, by whose attention its tokens "
                "would be ranked. Pass a frame and the text after it in one call, or choose a score other than "
                "'attention'."
            )
        slots[mine] = text[after] if which == "next" else text[-1]
    pairs = np.stack([groups.group_rows, slots])
    unique, query = np.unique(pairs, axis=1, return_inverse=True)
    return Queries(unique[0], unique[1], query.reshape(-1), ends)


def _group_ends(host_BT: np.ndarray) -> np.ndarray:
    """Place in its row of each group's last token, [G]."""
    table, sizes, _ = _group_table(np.maximum(host_BT, TEXT))
    return table[np.arange(len(sizes)), sizes - 1] % host_BT.shape[1]
