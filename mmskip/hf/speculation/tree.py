"""Verify a tree of drafts in one pass: its mask and positions, and the drafts that the model agrees with.

A tree is a chain of drafts with alternatives beside some of them; no draft follows an alternative. The query at place 0
is the newest token of the row, the root; draft i is at place i + 1.

Shape suffixes: B rows, S slots of the cache before the pass, Q queries (the root and the drafts), V vocabulary, K most
likely tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass
class DraftTree:
    """The drafts of one row.

    Attributes:
        tokens: of each draft.
        parents: its parent, -1 for the root.
        end: the last draft of the chain, -1 while there is none.
        length: drafts of the chain.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    end: int = -1
    length: int = 0

    def add(self, token: int, alternatives: Sequence[int] = ()) -> None:
        """Append a draft to the chain, and its alternatives."""
        for other in alternatives:
            self.tokens.append(other)
            self.parents.append(self.end)
        self.tokens.append(token)
        self.parents.append(self.end)
        self.end = len(self.tokens) - 1
        self.length += 1

    def child(self, node: int, token: int) -> int | None:
        """Return the draft of this token after `node`, or None."""
        found = (i for i, parent in enumerate(self.parents) if parent == node and self.tokens[i] == token)
        return next(found, None)


def alternatives(tokens: Sequence[int], probs_BV: Tensor, most: int, above: float) -> list[list[int]]:
    """Find up to `most` tokens other than the draft of each row whose probability is at least `above`."""
    count = min(most, probs_BV.shape[1] - 1)
    if not count:
        return [[] for _ in tokens]
    best_BK, index_BK = probs_BV.topk(count + 1)
    likely = (best_BK >= above).tolist()
    return [
        [other for other, able in zip(row, enough, strict=True) if able and other != token][:count]
        for row, enough, token in zip(index_BK.tolist(), likely, tokens, strict=True)
    ]


def walk(tree: DraftTree, choose: Callable[[int, list[int]], int]) -> tuple[list[int], list[int]]:
    """Follow the model through a tree: at each place it chooses its own token, and continues where that was drafted.

    Args:
        choose: the token after query `place`, given the drafts accepted so far.

    Returns:
        The tokens chosen, the last of which was not drafted; and the places whose keys and values are kept.
    """
    node, places = -1, [0]
    tokens: list[int] = []
    while True:
        tokens.append(choose(node + 1, tokens[:]))
        found = tree.child(node, tokens[-1])
        if found is None:
            return tokens, places
        node = found
        places.append(node + 1)


def tree_inputs(mask_BS: Tensor, trees: Sequence[DraftTree]) -> tuple[Tensor, Tensor]:
    """Return which queries see each other, BoolTensor [B, Q, Q], and the position of each, LongTensor [B, Q]."""
    batch, queries = len(trees), 1 + max(len(tree.tokens) for tree in trees)
    sees = torch.eye(queries, dtype=torch.bool).repeat(batch, 1, 1)
    sees[:, :, 0] = True
    depth = torch.ones(batch, queries, dtype=torch.long)
    depth[:, 0] = 0
    for row, tree in enumerate(trees):
        for i, parent in enumerate(tree.parents):
            sees[row, i + 1] |= sees[row, parent + 1]
            depth[row, i + 1] = depth[row, parent + 1] + 1
    return sees.to(mask_BS.device), depth.to(mask_BS.device) + mask_BS.sum(1, keepdim=True)


def tree_mask(
    mask_BS: Tensor, sees_BQQ: Tensor, positions_BQ: Tensor, windows: Sequence[int | None], dtype: torch.dtype
) -> Any:
    """Build the additive mask [B, 1, Q, S + Q] of the pass; a dict by kind of attention where a model has both.

    Args:
        windows: sliding window of each block, None for full attention.
    """
    batch, queries = positions_BQ.shape
    old_BQS = mask_BS.bool()[:, None].expand(-1, queries, -1)
    full = torch.cat([old_BQS, sees_BQQ], 2)
    places = torch.cat([(mask_BS.cumsum(1) - 1).clamp(min=0), positions_BQ], 1)

    def made(window: int | None) -> Tensor:
        seen = full if window is None else full & (places[:, None] > positions_BQ[..., None] - window)
        empty = torch.zeros(batch, 1, queries, seen.shape[-1], dtype=dtype, device=seen.device)
        return empty.masked_fill(~seen[:, None], torch.finfo(dtype).min)

    kinds = dict.fromkeys(windows)
    if len(kinds) == 1:
        return made(next(iter(kinds)))
    sliding = next(window for window in kinds if window is not None)
    return {FULL: made(None), SLIDING: made(sliding)}


def kept_slots(places: Sequence[Sequence[int]], before: int) -> Tensor:
    """Return the slots of each row's tokens after a pass, right-aligned, LongTensor [B, slots]; -1 before rows that
    accepted fewer.

    Args:
        places: of the queries each row keeps.
        before: slots of the cache before the pass.
    """
    most = max(map(len, places))
    rows = [[-1] * (most - len(row)) + list(range(before)) + [before + place for place in row] for row in places]
    return torch.tensor(rows)
