"""Record which tokens were processed, and run a model again under that selection.

In half precision two ways of computing the same values (frame by frame, or all frames at once) round differently, so
that a few close scores change their order. Under recorded selections everything else can be compared.

Shape suffixes: B rows, T tokens, G groups (frames), N tokens of the largest group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmskip.recording import Trace
from mmskip.tokens.groups import TEXT, TokenGroups
from mmskip.tokens.selection import Selection, compact

_active: ContextVar["Replay | None"] = ContextVar("mmskip_replay", default=None)


@dataclass
class Selections:
    """The tokens that each block kept of each frame.

    Attributes:
        kept: by site, then by (row, frame id): BoolTensor with one entry per vision token of the frame.
    """

    kept: dict[str, dict[tuple[int, int], Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace) -> "Selections":
        """Read the forwards of a trace; of a frame that ran twice the later run counts.

        Raises:
            ValueError: no method routes tokens in it.
        """
        found = cls()
        for forward in trace.forwards:
            if forward.layout is None:
                continue
            layout = forward.layout.cpu()
            routed = {layer.site: layer.kept.cpu() for layer in forward.layers if layer.kept is not None}
            for row, line in enumerate(layout):
                for frame in line[line != TEXT].unique().tolist():
                    for site, kept in routed.items():
                        found.kept.setdefault(site, {})[row, frame] = kept[row, line == frame]
        if not found.kept:
            raise ValueError("the trace holds no selections: no method routes tokens of frames in it.")
        return found

    def of_row(self, row: int) -> "Selections":
        """Return the selections of one row, for a batch of this row alone."""
        return Selections(
            {
                site: {(0, frame): mask for (number, frame), mask in kept.items() if number == row}
                for site, kept in self.kept.items()
            }
        )


@dataclass
class Replay:
    """A model running under recorded selections.

    Attributes:
        selections: the recorded selections.
        compared: number of kept vision tokens of the record.
        flipped: how many of them the model itself would not have kept.
    """

    selections: Selections
    compared: int = 0
    flipped: int = 0

    @property
    def flipped_share(self) -> float:
        """Share of the recorded tokens that the model itself would not have kept, in [0, 1]."""
        return self.flipped / self.compared if self.compared else 0.0


@contextmanager
def replaying(selections: Selections) -> Iterator[Replay]:
    """Let routed blocks process the recorded tokens in forwards inside; gates are computed as usual."""
    replay = Replay(selections)
    token = _active.set(replay)
    try:
        yield replay
    finally:
        _active.reset(token)


def replayed(site: str, selection: Selection, groups: TokenGroups) -> Selection:
    """Return the recorded selection in place of a routed block's `selection`, inside `replaying`; else `selection`.

    Raises:
        ValueError: the record lacks a frame of the call, or kept another number of its tokens.
    """
    replay = None if torch.compiler.is_compiling() else _active.get()
    if replay is None or not groups.has_vision:
        return selection
    recorded = replay.selections.kept.get(site, {})
    layout, keep_BT = groups.layout_BT.cpu(), (groups.layout_BT == TEXT).cpu() & selection.keep_BT.cpu()
    chosen_BT = selection.keep_BT.cpu()
    for row, line in enumerate(layout):
        for frame in line[line != TEXT].unique().tolist():
            places, kept = line == frame, recorded.get((row, frame))
            if kept is None or len(kept) != int(places.sum()) or kept.sum() != chosen_BT[row, places].sum():
                raise ValueError(
                    f"{site}: the record has no selection that fits frame {frame} of row {row}; record and replay the "
                    "same frames with the same keep."
                )
            keep_BT[row, places] = kept
            replay.compared += int(kept.sum())
            replay.flipped += int((kept & ~chosen_BT[row, places]).sum())
    rows = None if selection.valid_BS is None else selection.valid_BS.sum(1)
    again = compact(keep_BT.to(selection.keep_BT.device), selection.index_BS.shape[1], rows)
    return replace(again, kept_G=selection.kept_G, kept_B=selection.kept_B)
