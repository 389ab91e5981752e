"""The attention and the MLP of a block, run, left out, or run for their keys and values alone.

Shape suffixes: B batch, T tokens of a call, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.families.base import Site
from mmskip.hf.calls import CACHE_ARGUMENTS, StoredError, given_cache
from mmskip.hf.structure import returned_values
from mmskip.swap import bind, state_of, states_of, with_states

RUN, DROP, FILL, MIX = "run", "drop", "fill", "mix"
"""Modes of a part: it runs; adds nothing; adds nothing but stores keys and values; adds nothing for some tokens."""


@dataclass
class PartState:
    """Whether the attention or MLP of a block runs in the current visit.

    Attributes:
        block: index of its block.
        returns: how many values its `forward` returns as a tuple; 0: a tensor.
        mode: `RUN`, `DROP`, `FILL` or `MIX`.
        planned_T: BoolTensor [T] of mode `MIX`, True for the tokens it adds nothing to.
    """

    block: int
    returns: int
    mode: str = RUN
    planned_T: Tensor | None = None


class PlannedPart(nn.Module):
    """Mixin of the attention or MLP of a block: adds nothing in the visits that leave it out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: PartState = state_of(self, PlannedPart)
        if state.mode == RUN:
            return super().forward(*args, **kwargs)
        if state.mode == MIX:
            output = super().forward(*args, **kwargs)
            assert state.planned_T is not None
            return with_states(output, states_of(output).masked_fill(state.planned_T[None, :, None], 0))
        bound = bind(self, args, kwargs)
        x_BTD = args[0] if args else bound["hidden_states"]
        if state.mode == FILL and getattr(self, "layer_idx", None) is not None:
            cache = given_cache(bound)
            entry = cache._entry if isinstance(cache, EntryCache) else state.block
            try:
                super().forward(**with_entry(bound, entry, stop=True))
            except StoredError:
                pass
            else:
                raise RuntimeError(
                    f"the attention of block {state.block} stored no keys and values; use cache_policy='skip'."
                )
        zero = torch.zeros_like(x_BTD)
        return (zero, *[None] * (state.returns - 1)) if state.returns else zero


class EntryCache:
    """A cache whose `update` writes one given entry, and may end the forward there."""

    def __init__(self, cache: Any, entry: int, stop: bool) -> None:
        self._cache, self._entry, self._stop = cache, entry, stop

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store in the given entry whatever `layer_idx` says."""
        stored = self._cache.update(key_states, value_states, self._entry, *args, **kwargs)
        if self._stop:
            raise StoredError
        return stored

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_cache":
            raise AttributeError(name)
        return getattr(self._cache, name)


def with_entry(bound: dict[str, Any], entry: int, stop: bool = False) -> dict[str, Any]:
    """Replace the cache among a block's arguments by one that writes `entry`, and ends the forward there if `stop`."""
    given = [name for name in CACHE_ARGUMENTS if bound.get(name) is not None]
    return {**bound, **{name: EntryCache(bound[name], entry, stop) for name in given}}


def part_sites(view: Any) -> dict[str, dict[int, Site]]:
    """Return the sites of attentions and MLPs that are separate modules: by `attn` and `mlp`, then by block index."""
    return {kind: {site.index: site for site in view.sites(kind)} for kind in ("attn", "mlp")}


def part_state(site: Site) -> PartState:
    """Return the state of a part that runs.

    Raises:
        ValueError: its source does not show what it returns.
    """
    return PartState(site.index, returned_values(site.module))
