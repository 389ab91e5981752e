"""Text queries whose attention ranks the tokens of a group.

Shape suffixes: B batch, T tokens, D width, G groups of the batch, N tokens of the largest group, S slots of
the largest row after selection.
"""

from dataclasses import dataclass

import numpy as np

from mmskip.tokens.groups import TEXT, TokenGroups, group_table


@dataclass(frozen=True)
class Queries:
    """Text tokens by whose attention vision tokens are ranked, on the host.

    Attributes:
        rows_Q, slots_Q: batch row of each query and its slot in this call, [Q].
        query_G: index of the query that ranks each group, [G].
        ends_G: slot in this call of each group's last token, [G].
    """

    rows_Q: np.ndarray
    slots_Q: np.ndarray
    query_G: np.ndarray
    ends_G: np.ndarray


def ranking_queries(groups: TokenGroups, which: str) -> Queries:
    """Find the text token that ranks each group. Text that `generate` appended to the prompt never ranks.

    Args:
        which: `"next"`: the first text token after the group, so that no later token decides what the group keeps;
            `"last"`: the last one of the row in this call.

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
                f"frame {frame} of row {int(row)} is followed by no text in this call whose attention could rank its "
                "tokens. Pass a frame and the text after it in one call, or choose a score other than 'attention'."
            )
        slots[mine] = text[after] if which == "next" else text[-1]
    pairs = np.stack([groups.group_rows, slots])
    unique, query = np.unique(pairs, axis=1, return_inverse=True)
    return Queries(unique[0], unique[1], query.reshape(-1), ends)


def _group_ends(host_BT: np.ndarray) -> np.ndarray:
    """Return the slot of each group's last token in its row, [G]."""
    table, sizes, _ = group_table(np.maximum(host_BT, TEXT))
    return table[np.arange(len(sizes)), sizes - 1] % host_BT.shape[1]
