"""Which tokens of running streams a layer stores: streams differ in length, and a window may bound them.

A ledger knows the positions of the stored entries and plans what a call does to them; the tensors follow its plans
(`mmskip.hf.streaming.cache`). Layers that store the same tokens share one ledger.

Shape suffixes: B streams, S new entries, K stored entries, C capacity.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

EMPTY = 1 << 40
"""The position of an unused entry: after every query, so that no query sees it."""

TEXT_PIECE = 32
"""Most tokens of text that drop out of a window together."""


class TokenRun(NamedTuple):
    """Consecutive tokens of one stream in a call: one frame (`vision`), or text. Positions [begin, end)."""

    begin: int
    end: int
    vision: bool


class Piece(NamedTuple):
    """Entries that are dropped together: `entries` of the positions [begin, end)."""

    entries: int
    begin: int
    end: int
    vision: bool


class Move(NamedTuple):
    """The entries of a stream that are kept when room is made: the first `pinned`, and those from `first` to `stop`."""

    pinned: int
    first: int
    stop: int


@dataclass
class StorePlan:
    """Steps of one call on the tensors of a layer, in this order.

    Attributes:
        number: of the call.
        turn_BK: LongTensor, by how many positions the stored keys are rotated back; None: not at all.
        moves: per stream, the entries copied into new buffers; None: the buffers stay.
        capacity: C, entries of the buffers (one more column takes padding).
        column: first column of the new entries, where it is the same for all streams.
        columns_BS: LongTensor, the columns of the new entries where streams differ; else None.
        length: K, entries that attention sees after the call.
    """

    number: int
    turn_BK: Tensor | None
    moves: list[Move] | None
    capacity: int
    column: int
    columns_BS: Tensor | None
    length: int


def pieces_of(runs: Sequence[TokenRun], kept: Callable[[int], int], sinks: int) -> list[Piece]:
    """Cut the call of one stream into pieces: each frame is one, text is cut at the sinks and into short pieces.

    Args:
        runs: of the call, in order.
        kept: number of entries stored of the i-th frame of the call.
        sinks: first positions, which are never dropped.
    """
    pieces: list[Piece] = []
    frame = 0
    for run in runs:
        if run.vision:
            pieces.append(Piece(kept(frame), run.begin, run.end, True))
            frame += 1
            continue
        cuts = [*range(run.begin, run.end, TEXT_PIECE), run.end]
        if run.begin < sinks < run.end:
            cuts = sorted({*cuts, sinks})
        pieces += [Piece(end - begin, begin, end, False) for begin, end in itertools.pairwise(cuts)]
    return pieces


class SlotLedger:
    """The stored entries of B streams in one layer, or in several that store the same tokens.

    Args:
        rows: B.
        window: a token sees itself and the `window - 1` positions before it; None: all.
        sinks: first positions of a stream, which always stay visible.
        device: of the positions.
    """

    def __init__(self, rows: int, window: int | None, sinks: int, device: torch.device) -> None:
        self.rows, self.window, self.sinks = rows, window, sinks
        self.counts = [0] * rows
        self.pinned = [0] * rows
        self.pieces: list[deque[Piece]] = [deque() for _ in range(rows)]
        self.capacity = 0
        self.positions_BC = torch.full((rows, 1), EMPTY, device=device)
        self.plan: StorePlan | None = None
        self._number = 0

    @property
    def entries(self) -> int:
        """Number of stored entries of all streams."""
        return sum(self.counts)

    def announce(
        self,
        positions_BS: Tensor,
        pieces: Sequence[Sequence[Piece]],
        starts: Sequence[int],
        turns: Sequence[int] | None = None,
    ) -> StorePlan:
        """Plan a call.

        Args:
            positions_BS: LongTensor, positions of the new entries, those of each stream first, then padding.
            pieces: of each stream; the sum of their entries says how many of S belong to it.
            starts: length of each stream before the call.
            turns: per stream, by how many positions its stored keys are rotated back; None: not at all.
        """
        new = [sum(piece.entries for piece in row) for row in pieces]
        turn_BK = None if turns is None else self._turn(turns)
        moves = self._make_room(new, starts) if self._full(new) else None
        column, columns_BS = self._columns(new, positions_BS.shape[1])
        if columns_BS is not None:
            self.positions_BC.scatter_(1, columns_BS, positions_BS)
        else:
            self.positions_BC[:, column : column + positions_BS.shape[1]] = positions_BS
        for row, added in enumerate(new):
            self.counts[row] += added
            for piece in pieces[row]:
                if piece.begin < self.sinks:
                    self.pinned[row] += piece.entries
                self.pieces[row].append(piece)
        self._number += 1
        self.plan = StorePlan(self._number, turn_BK, moves, self.capacity, column, columns_BS, max(self.counts))
        return self.plan

    def positions_BK(self) -> Tensor:
        """Return the positions of all entries that attention sees, `EMPTY` after the last one of a shorter stream."""
        return self.positions_BC[:, : max(self.counts)]

    def crop(self, row: int, position: int) -> None:
        """Forget the entries of a stream from `position` on, which must be the end of a frame or inside text."""
        kept, pieces = self.counts[row], self.pieces[row]
        while pieces and pieces[-1].end > position:
            piece = pieces.pop()
            left = 0 if piece.vision else max(position - piece.begin, 0)
            if piece.begin < self.sinks:
                self.pinned[row] -= piece.entries - left
            kept -= piece.entries - left
            if left:
                pieces.append(Piece(left, piece.begin, position, False))
        self.positions_BC[row, kept : self.counts[row]] = EMPTY
        self.counts[row] = kept

    def _full(self, new: Sequence[int]) -> bool:
        return any(count + added > self.capacity for count, added in zip(self.counts, new, strict=True))

    def _turn(self, turns: Sequence[int]) -> Tensor:
        positions_BK = self.positions_BK()
        turns_B1 = torch.tensor(turns, device=positions_BK.device)[:, None]
        return turns_B1 * ((positions_BK >= self.sinks) & (positions_BK != EMPTY))

    def _make_room(self, new: Sequence[int], starts: Sequence[int]) -> list[Move]:
        """Drop entries that no later token sees, and choose a capacity with an eighth to spare, so that entries rarely
        move."""
        old_BC = self.positions_BC
        moves = [self._drop(row, starts[row]) for row in range(self.rows)]
        need = max(count + added for count, added in zip(self.counts, new, strict=True))
        self.capacity = need + need // 8
        self.positions_BC = torch.full((self.rows, self.capacity + 1), EMPTY, device=old_BC.device)
        for row, (pinned, first, stop) in enumerate(moves):
            self.positions_BC[row, :pinned] = old_BC[row, :pinned]
            self.positions_BC[row, pinned : pinned + stop - first] = old_BC[row, first:stop]
        return moves

    def _drop(self, row: int, start: int) -> Move:
        stop, first = self.counts[row], self.pinned[row]
        if self.window is not None:
            held: list[Piece] = []
            pieces = self.pieces[row]
            while pieces and (pieces[0].begin < self.sinks or pieces[0].end <= start - self.window + 1):
                piece = pieces.popleft()
                if piece.begin < self.sinks:
                    held.append(piece)
                else:
                    first += piece.entries
            pieces.extendleft(reversed(held))
        pinned = self.pinned[row]
        self.counts[row] = pinned + stop - first
        return Move(pinned, first, stop)

    def _columns(self, new: Sequence[int], slots: int) -> tuple[int, Tensor | None]:
        if len(set(self.counts)) == 1 and all(added == slots for added in new):
            return self.counts[0], None
        slot_S = np.arange(slots)
        columns = np.array(self.counts)[:, None] + slot_S
        columns = np.where(slot_S < np.array(new)[:, None], columns, self.capacity)
        return 0, torch.from_numpy(columns).to(self.positions_BC.device)

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` needs besides the positions, JSON-ready."""
        return {
            "counts": self.counts,
            "pinned": self.pinned,
            "pieces": [[list(piece) for piece in row] for row in self.pieces],
        }

    def restore(self, state: dict[str, Any], positions_BK: Tensor) -> None:
        """Restore a saved state; the buffers are then full."""
        self.counts, self.pinned = list(state["counts"]), list(state["pinned"])
        self.pieces = [deque(Piece(*piece) for piece in row) for row in state["pieces"]]
        self.capacity = positions_BK.shape[1]
        empty = torch.full((self.rows, 1), EMPTY, device=self.positions_BC.device)
        self.positions_BC = torch.cat([positions_BK.to(empty.device), empty], dim=1)


def bound_entries(window: int, sinks: int, frame_tokens: int, call_tokens: int) -> int:
    """Bound the entries that the buffers of one stream and layer ever hold under a window.

    Args:
        window, sinks: see `SlotLedger`.
        frame_tokens: most tokens of a frame.
        call_tokens: most tokens of a call.
    """
    piece = max(frame_tokens, TEXT_PIECE)
    need = (sinks + frame_tokens if sinks else 0) + window - 1 + piece + call_tokens
    return need + need // 8 + 1
