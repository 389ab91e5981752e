"""Draft with parts of the blocks left out, on the live cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmskip.hf.plans.parts import DROP, RUN, PartState, PlannedPart, part_sites, part_state
from mmskip.hf.structure import parts_of
from mmskip.recording import Work, recorder
from mmskip.swap import Change, around, state_of


@dataclass
class DraftState:
    """Shared by the blocks of a drafting model.

    Attributes:
        active: whether the current forward drafts.
        attn, mlp: indices of the blocks whose attention and whose MLP drafts leave out.
    """

    active: bool = False
    attn: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Let forwards inside draft."""
        self.active = True
        try:
            yield
        finally:
            self.active = False


@dataclass(frozen=True)
class DraftSite:
    """State of one block of a drafting model; `parts` are the states of its attention and MLP."""

    index: int
    shared: DraftState
    parts: tuple[PartState | None, PartState | None]


class DraftBlock(nn.Module):
    """Mixin of a block: in a draft, leave out its attention, its MLP, or both."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        site: DraftSite = state_of(self, DraftBlock)
        left_out = (site.index in site.shared.attn, site.index in site.shared.mlp)
        if not site.shared.active or not any(left_out):
            return super().forward(*args, **kwargs)
        recording = recorder()
        if recording is not None:
            recording.visit(self)
        x_BTD = args[0] if args else kwargs["hidden_states"]
        if all(left_out):
            return x_BTD
        if recording is not None:
            slots = x_BTD.shape[0] * x_BTD.shape[1]
            recording.visit(self, Work(slots, slots * (not left_out[0]), slots * (not left_out[1])))
        dropped = [part for part, out in zip(site.parts, left_out, strict=True) if out and part is not None]
        for part in dropped:
            part.mode = DROP
        try:
            return super().forward(*args, **kwargs)
        finally:
            for part in dropped:
                part.mode = RUN


def draft_units(view: Any) -> list[tuple[int | None, int | None]]:
    """List what a draft may leave out: attention and MLP of every block but the first and the last, as indices
    (attention, MLP) with None for a part that runs; both at once where a block has no module for its MLP."""
    units: list[tuple[int | None, int | None]] = []
    for index in range(1, len(view.blocks) - 1):
        _, mlp = parts_of(view.blocks[index])
        units += [(index, None), (None, index)] if mlp is not None else [(index, index)]
    return units


def draft_changes(view: Any, draft: DraftState, last: bool) -> list[Change]:
    """Build the changes by which blocks draft; the last block only with `last`, the first one never."""
    changes = []
    parts = part_sites(view)
    for block in view.sites("block")[1 : len(view.blocks) if last else -1]:
        states: dict[str, PartState | None] = {"attn": None, "mlp": None}
        for kind, sites in parts.items():
            if block.index in sites:
                states[kind] = part_state(sites[block.index])
                changes.append(around(sites[block.index], PlannedPart, states[kind], "draft"))
        state = DraftSite(block.index, draft, (states["attn"], states["mlp"]))
        changes.append(around(block, DraftBlock, state, "draft"))
    return changes
