"""The state of one forward of a stack that is exited early: which states are active, on which rows layers run.

Shape suffixes: B batch, T tokens, D width, N rows that run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.exits.rules import Decide, ExitRule
from mmskip.recording import Work, recorder
from mmskip.swap import states


@dataclass
class Run:
    """One forward of a stack, shared by its blocks. All but `exits` is dropped after the last block.

    Attributes:
        depth: layers.
        exits: layers that ran for each state, [B, T] or [B], of the latest forward; None: it did not run yet, or ran in
            training mode, where nothing exits.
        active: boolean of the same shape, True where layers still run; None: everywhere.
        num_active: number of active states.
        rows, others: indices of the rows that layers run on, and of the rest; None: on all.
        selected: arguments of blocks, the same for all of them, and their values for `rows`; by name.
        visited: layers of the latest forward that ran.
        slots, pairs, filled: of the block under way, the token slots that it processed, the (query, key) pairs of its
            attention without cached ones, and the slots of which it computed keys and values alone.
        tail: what the blocks return beside the states.
        past: tokens before the call.
        cache: replaces the model's where it was asked for none.
        decide: decisions of this forward, see `ExitRule.begin`.
    """

    depth: int
    exits: Tensor | None = None
    active: Tensor | None = None
    num_active: int = 0
    rows: Tensor | None = None
    others: Tensor | None = None
    selected: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    visited: int = 0
    slots: int = 0
    pairs: int = 0
    filled: int = 0
    tail: tuple[Any, ...] | None = None
    past: int = 0
    cache: Any = None
    decide: Any = None

    def start(self, shape: torch.Size, device: torch.device, decide: Decide, past: int = 0) -> None:
        """Begin a forward of states of `shape`; forget the one before."""
        self.exits = torch.full(shape, self.depth, device=device)
        self.active, self.num_active, self.visited = None, self.exits.numel(), 0
        self._choose(None, None)
        self.tail, self.past, self.cache, self.decide = None, past, None, decide

    def finish(self) -> None:
        """Drop all but the exits after the last block: tensors of a graph cannot be copied with the model."""
        self.active = self.tail = self.cache = self.decide = None
        self._choose(None, None)

    def _choose(self, rows: Tensor | None, others: Tensor | None) -> None:
        self.rows, self.others = rows, others
        if self.selected:
            self.selected = {}

    def output(self, index: int, x_BTD: Tensor) -> Any:
        """Return what block `index` returns with the states `x_BTD`, also if it did not run."""
        output = x_BTD if self.tail is None else (x_BTD, *self.tail)
        if index + 1 == self.depth:
            self.finish()
        return output

    def read(self, output: Any, keep_tail: bool = True) -> Tensor:
        """Count a layer that ran and return its states.

        Args:
            keep_tail: whether the rest of its output is that of all rows.
        """
        self.visited += 1
        if keep_tail:
            self.tail = tuple(output[1:]) if isinstance(output, tuple) else None
        return self.count(output[0] if isinstance(output, tuple) else output)

    def count(self, x_BTD: Tensor) -> Tensor:
        """Count states that the block under way has processed, and return them."""
        batch, length = x_BTD.shape[:2]
        self.slots += batch * length
        self.pairs += batch * length**2
        return x_BTD

    def record(self, block: nn.Module, index: int, name: str, splits: bool = False) -> None:
        """Report what block `index` ran for the stack `name` to the trace under way.

        Args:
            splits: whether it ran on some tokens of each row, which attend only to one another.
        """
        recording = recorder()
        if recording is not None:
            pairs = self.pairs if splits else None
            recording.block(block, Work(self.slots, filled=self.filled, pairs=pairs))
            if index + 1 == self.depth and self.exits is not None:
                recording.exits(name, self.exits)
        self.slots = self.pairs = self.filled = 0

    def keep(self, y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """Return new states where layers still run, old ones elsewhere."""
        if self.active is None:
            return y_BTD
        return torch.where(self.active.view(*self.active.shape, *(1,) * (3 - self.active.dim())), y_BTD, x_BTD)

    def stop(self, layers: int, after_BTD: Tensor, before_BTD: Tensor, rule: ExitRule) -> None:
        """Let states exit after layer number `layers`."""
        assert self.exits is not None
        if layers == rule.last_layer:
            self._stop_all(layers)
            return
        recording = recorder()
        states_BTD = (after_BTD, before_BTD)
        exits = self.decide(*states_BTD) if recording is None else recording.overhead(self.decide, *states_BTD)
        if isinstance(exits, bool):
            if exits:
                self._stop_all(layers)
            return
        if self.active is not None:
            exits = exits & self.active
        if not bool(exits.any()):  # the host decides which layers are called
            return
        self.exits = torch.where(exits, layers, self.exits)
        self.active = ~exits if self.active is None else self.active & ~exits
        self.num_active = int(self.active.sum())
        if self.num_active and self.active.shape[0] > 1:
            self._compact(rule)

    def _stop_all(self, layers: int) -> None:
        """Let every active state exit, without a device sync."""
        assert self.exits is not None
        if self.active is None:
            self.exits = torch.full_like(self.exits, layers)
        else:
            self.exits = torch.where(self.active, layers, self.exits)
        self.active, self.num_active = torch.zeros_like(self.exits, dtype=torch.bool), 0

    def _compact(self, rule: ExitRule) -> None:
        """Choose the rows that the next layers run on."""
        assert self.active is not None
        active_B = self.active if self.active.dim() == 1 else self.active.any(1)
        rows = active_B.nonzero()[:, 0]
        if len(rows) < len(active_B) and rule.compacts(len(rows), len(active_B)):
            self._choose(rows, (~active_B).nonzero()[:, 0])
        else:
            self._choose(None, None)

    def select(self, values: dict[str, Any], x_name: str) -> dict[str, Any]:
        """Return a block's arguments for the rows that layers run on. Those that many blocks get, such as the encoder's
        states, are selected once."""
        assert self.rows is not None
        x_BTD = values[x_name]
        own = {name: v for name, v in values.items() if name not in self.selected or self.selected[name][0] is not v}
        found = rows_of(own, self.rows, len(x_BTD))
        self.selected |= {name: (own[name], found[name]) for name in own if name != x_name}
        return {name: found[name] if name in found else self.selected[name][1] for name in values}


def rows_of(values: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """Return a block's arguments for some rows of the batch, `rows` [N]."""
    found = {name: _rows(value, rows, batch, 2 if name == "position_ids" else 3) for name, value in values.items()}
    mask = values.get("attn_mask")
    if isinstance(mask, Tensor) and mask.dim() == 3 and len(mask) > batch:  # of every head, row by row
        found["attn_mask"] = mask.unflatten(0, (batch, -1)).index_select(0, rows).flatten(0, 1)
    return found


def _rows(value: Any, rows: Tensor, batch: int, least: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_rows(part, rows, batch, least) for part in value)
    # tensors of fewer dimensions are tables of positions, the same for all rows
    if isinstance(value, Tensor) and value.dim() >= least and value.shape[0] == batch:
        return value.index_select(0, rows)
    return value


def runs(model: nn.Module) -> Iterator[tuple[str, Run]]:
    """Yield the runs of a model's exits once per stack, by name: `encoder` (or `image` and `text`), `decoder`."""
    known: set[int] = set()
    for state in states(model):
        found: Mapping[str, Run] = getattr(state, "exit_runs", {})
        for name, run in found.items():
            if id(run) not in known:
                known.add(id(run))
                yield name, run


def layers_run(model: nn.Module) -> dict[str, Tensor | None]:
    """Return how many layers ran for each state in the latest forward, by stack.

    Returns:
        `encoder` [B] (`image` and `text` where these exit apart) and `decoder` [B, T], LongTensors; None where the
        stack did not run yet, or ran in training mode, where nothing exits. Empty without early exit.
    """
    return {name: run.exits for name, run in runs(model)}
