"""Blocks of transformers that are left early, one by one on the states that still need them.

A decoder token that has exited keeps its state; layers above still owe its keys and values to later tokens. A layer
that some tokens of a call still need runs on all of them, or on the rows of the batch that hold such tokens where the
method says that this pays, and the exited ones keep their state. A layer that none needs is left out:

| policy | entry of an exited token in the layers above |
|---|---|
| `project` | the layer's own keys and values of the state at the exit, computed when the layer next runs |
| `copy` | keys and values of the last layer that ran |
| `hole` | none: later tokens do not attend to it there (a masked place is kept, so that positions stay) |

Shape suffixes: B batch, N rows that run, H heads, T tokens of the call, S stored tokens, E head width, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from mmskip.hf.calls import CACHE_NAME, PER_TOKEN_ARGUMENTS, StoredError
from mmskip.hf.exits.cache import (
    ExitLayer,
    PerToken,
    capture,
    exit_layer,
    last_entries,
    row_cache,
    serves_rows,
)
from mmskip.swap import bind, state_of

POLICIES = ("project", "copy", "hole")
Decide = Callable[[Tensor, Tensor], Tensor | bool]


class ExitRule(Protocol):
    """What a method says: at which layers states may exit, and when.

    Attributes:
        leaves: what exits, a name.
        points: numbers of layers that have run (from 1) at which an exit is decided, below the depth.
        last: number of the layer that no state goes beyond; None: the last one.
        policy: one of `POLICIES`; None for an encoder.
    """

    @property
    def leaves(self) -> str:
        """A name."""

    @property
    def points(self) -> tuple[int, ...]:
        """Numbers of layers."""

    @property
    def last(self) -> int | None:
        """A number."""

    @property
    def policy(self) -> str | None:
        """Of exited tokens' keys and values."""

    @property
    def remembers(self) -> bool:
        """Whether decisions about the first token hold for its row."""

    def begin(self, mask_BT: Tensor | None, past: int, memory: ExitLayer | None) -> Decide:
        """Called once per forward; the result is called behind each layer in `points` with the states behind and before
        it, [B, T, D], and says which states exit: boolean [B, T], or [B] for an encoder; or one bool for all of them.

        Args:
            mask_BT: of an encoder, False on padding; None: no padding.
            past: tokens before the first one of the call.
            memory: what holds `leaves` between the calls of a decoder that remembers; None: nothing does.
        """

    def compacts(self, left: int, rows: int) -> bool:
        """Whether a layer runs on the `left` of `rows` rows of the batch that still need it, instead of on all."""


def may_leave(rule: ExitRule, layers: int) -> bool:
    """Whether states may exit behind layer number `layers`."""
    return layers == rule.last or layers in rule.points


@dataclass
class Run:
    """One forward of a stack, shared by its blocks. What only they need is dropped behind the last one.

    Attributes:
        depth: layers.
        exits: layers that ran for each state, [B, T] or [B], of the latest forward; None: it was one in training.
        active: boolean of the same shape, True where layers still run; None: everywhere.
        left: how many states are active.
        rows, others: indices of the rows that layers run on, and of the rest; None: on all.
        selected: arguments of blocks, the same for all of them, and what they are for `rows`; by name.
        visited: layers of the latest forward that ran; and how many rows they ran on, in all.
        tail: what the blocks return beside the states.
        past: tokens before the call.
        cache: stands in for the model's where it was asked for none.
    """

    depth: int
    exits: Tensor | None = None
    active: Tensor | None = None
    left: int = 0
    rows: Tensor | None = None
    others: Tensor | None = None
    selected: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    visited: int = 0
    tail: tuple[Any, ...] | None = None
    past: int = 0
    cache: EncoderDecoderCache | DynamicCache | None = None
    decide: Any = None

    def start(self, shape: torch.Size, device: torch.device, decide: Decide, past: int = 0) -> None:
        """Forget the forward before."""
        self.exits = torch.full(shape, self.depth, device=device)
        self.active, self.left, self.visited = None, self.exits.numel(), 0
        self._choose(None, None)
        self.tail, self.past, self.cache, self.decide = None, past, None, decide

    def finish(self) -> None:
        """Hold nothing of the forward but its exits, behind the last block: what hangs on a graph cannot be copied."""
        self.active = self.tail = self.cache = self.decide = None
        self._choose(None, None)

    def _choose(self, rows: Tensor | None, others: Tensor | None) -> None:
        self.rows, self.others = rows, others
        if self.selected:
            self.selected = {}

    def keep(self, y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """New states where layers still run, old ones elsewhere."""
        if self.active is None:
            return y_BTD
        return torch.where(self.active.view(*self.active.shape, *(1,) * (3 - self.active.dim())), y_BTD, x_BTD)

    def stop(self, layers: int, after_BTD: Tensor, before_BTD: Tensor, rule: ExitRule) -> None:
        """Let states exit behind layer number `layers`."""
        assert self.exits is not None
        if layers == rule.last:
            self._stop_all(layers)
            return
        exits = self.decide(after_BTD, before_BTD)
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
        self.left = int(self.active.sum())
        if self.left and self.active.shape[0] > 1:
            self._compact(rule)

    def _stop_all(self, layers: int) -> None:
        """Let every state exit that has not, without asking the device."""
        assert self.exits is not None
        if self.active is None:
            self.exits = torch.full_like(self.exits, layers)
        else:
            self.exits = torch.where(self.active, layers, self.exits)
        self.active, self.left = torch.zeros_like(self.exits, dtype=torch.bool), 0

    def _compact(self, rule: ExitRule) -> None:
        """Choose the rows that the next layers run on."""
        assert self.active is not None
        alive_B = self.active if self.active.dim() == 1 else self.active.any(1)
        rows = alive_B.nonzero()[:, 0]
        if len(rows) < len(alive_B) and rule.compacts(len(rows), len(alive_B)):
            self._choose(rows, (~alive_B).nonzero()[:, 0])
        else:
            self._choose(None, None)

    def select(self, values: dict[str, Any], x_name: str) -> dict[str, Any]:
        """Arguments of a block for the rows that layers run on. Those that many blocks get, such as the encoder's
        states, are selected once."""
        assert self.rows is not None
        x_BTD = values[x_name]
        own = {name: v for name, v in values.items() if name not in self.selected or self.selected[name][0] is not v}
        found = rows_of(own, self.rows, len(x_BTD))
        self.selected |= {name: (own[name], found[name]) for name in own if name != x_name}
        return {name: found[name] if name in found else self.selected[name][1] for name in values}


@dataclass(frozen=True)
class BlockState:
    """State of `DecoderExit` and `EncoderExit` on one block.

    Attributes:
        cache_name, x_name: the block's arguments that take the cache and the states.
        is_point: whether states may exit behind this block.
        projects: whether exited tokens get the block's own keys and values.
    """

    index: int
    rule: ExitRule
    run: Run
    cache_name: str = CACHE_NAME
    x_name: str = "hidden_states"
    is_point: bool = field(init=False)
    projects: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_point", may_leave(self.rule, self.index + 1))
        object.__setattr__(self, "projects", self.rule.policy == "project")

    @property
    def told(self) -> dict[str, Run]:
        """The forward under way or the latest one, by what leaves."""
        return {self.rule.leaves: self.run}


def _output(state: BlockState, x_BTD: Tensor) -> Any:
    """What a block returns whose states are `x_BTD`, also one that is left out."""
    output = x_BTD if state.run.tail is None else (x_BTD, *state.run.tail)
    if state.index + 1 == state.run.depth:
        state.run.finish()
    return output


def _read(run: Run, output: Any, whole: bool = True) -> Tensor:
    run.visited += 1
    if whole:
        run.tail = tuple(output[1:]) if isinstance(output, tuple) else None
    return output[0] if isinstance(output, tuple) else output


def rows_of(values: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """Arguments of a block for some rows of the batch, `rows` [N]."""
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


class EncoderExit:
    """Mixin of an encoder block: every sample stops on its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState = state_of(self, EncoderExit)  # type: ignore[arg-type]
        if self.training:  # type: ignore[attr-defined]
            state.run.exits = None
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        values = bind(self, args, kwargs)  # type: ignore[arg-type]
        y_BTD = encode(super().forward, state.run, state.rule, state.index, values, state.x_name)  # type: ignore[misc]
        return _output(state, y_BTD)


def encode(
    call: Any, run: Run, rule: ExitRule, index: int, values: dict[str, Any], x_name: str = "hidden_states"
) -> Tensor:
    """States [B, T, D] behind encoder block `index`, whose own forward is `call`."""
    x_BTD = values[x_name]
    if index == 0:
        mask_BT = real_tokens(values.get("attention_mask", values.get("attn_mask")), x_BTD)
        run.start(x_BTD.shape[:1], x_BTD.device, rule.begin(mask_BT, 0, None))
    if not run.left:
        return x_BTD
    if run.rows is None:
        y_BTD = run.keep(_read(run, call(**values)), x_BTD)
    else:
        some = run.select(values, x_name)
        y_BTD = x_BTD.index_copy(0, run.rows, _read(run, call(**some), False))
    if may_leave(rule, index + 1):
        run.stop(index + 1, y_BTD, x_BTD, rule)
    return y_BTD


def real_tokens(mask: Tensor | None, x_BTD: Tensor) -> Tensor | None:
    """Which tokens are no padding, [B, T]: those that any query sees, under a bidirectional, windowed or causal mask.
    None where the mask does not tell rows apart. (The text towers of CLIP are called without one: what follows a
    text's end counts there as tokens of it.)

    Args:
        mask: what blocks get, boolean or added to the scores: [B, 1, T, T], or [B * H, T, T] and [T, T] of open_clip.

    Raises:
        ValueError: a mask of another shape.
    """
    batch, count = x_BTD.shape[:2]
    if mask is None or mask.shape == (count, count):
        return None
    if mask.dim() == 3 and len(mask) % batch == 0 and mask.is_floating_point():
        mask = mask.unflatten(0, (batch, -1))
    if mask.dim() != 4:
        raise ValueError(
            f"the encoder's attention mask is {tuple(mask.shape)}; early exit reads padding from [B, 1, T, T] masks, "
            "which the attention implementations 'eager' and 'sdpa' use."
        )
    seen_BTS = mask[:, 0]
    seen_BTS = seen_BTS if seen_BTS.dtype == torch.bool else seen_BTS > torch.finfo(seen_BTS.dtype).min / 2
    return seen_BTS.any(1).expand(batch, -1)


class DecoderExit:
    """Mixin of a decoder block: every token stops on its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState = state_of(self, DecoderExit)  # type: ignore[arg-type]
        if self.training:  # type: ignore[attr-defined]
            state.run.exits = None
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        values, run, index = bind(self, args, kwargs), state.run, state.index  # type: ignore[arg-type]
        x_BTD, cache = values["hidden_states"], values.get(state.cache_name)
        if index == 0:
            past = 0 if cache is None else exit_layer(cache, 0).get_seq_length()
            kept = cache is not None and state.rule.remembers
            memory: Any = exit_layer(cache, state.rule.points[0]) if kept else None
            run.start(x_BTD.shape[:2], x_BTD.device, state.rule.begin(None, past, memory), past)
        entry = None if cache is None else exit_layer(cache, index)
        if run.active is None and state.projects and not (isinstance(entry, ExitLayer) and entry.owed):
            y_BTD = _read(run, super().forward(**values))  # type: ignore[misc]  # nothing has left: as it is
        else:
            y_BTD = self._after_exits(state, entry, values)
        if state.is_point and run.left:
            run.stop(index + 1, y_BTD, x_BTD, state.rule)
        return _output(state, y_BTD)

    def _after_exits(self, state: BlockState, entry: DynamicLayer | None, values: dict[str, Any]) -> Tensor:
        """States [B, T, D] behind the block, some of which may have exited, in this call or before."""
        run, cache, policy = state.run, values.get(state.cache_name), state.rule.policy
        x_BTD = values["hidden_states"]
        if cache is None and policy == "copy":
            if run.cache is None:
                crosses = values.get("encoder_hidden_states") is not None
                run.cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if crosses else DynamicCache()
            cache = values[state.cache_name] = run.cache
            entry = exit_layer(cache, state.index)
        if state.index and policy == "hole":
            values["attention_mask"] = _with_holes(values.get("attention_mask"), entry, run, x_BTD)
        if not run.left:
            if isinstance(entry, ExitLayer):
                _pass_by(state, entry, cache, values)
            return x_BTD
        if isinstance(entry, ExitLayer) and entry.owed:
            states_BTD, per_token = entry.debts()
            entry.update(*self._project(state, cache, {**values, **per_token, "hidden_states": states_BTD}))
        return run.keep(self._run(state, entry, cache, values), x_BTD)

    def _run(self, state: BlockState, entry: DynamicLayer | None, cache: Any, values: dict[str, Any]) -> Tensor:
        """States [B, T, D] behind the block, which runs on all rows or on those that need it."""
        run, copies = state.run, state.rule.policy == "copy"
        if isinstance(entry, ExitLayer) and copies and run.active is not None:
            entry.swap = run.active, exit_layer(cache, state.index - 1)
        try:
            if run.rows is None or not serves_rows(cache, entry, state.index):
                return _read(run, super().forward(**values))  # type: ignore[misc]
            x_BTD, others = values["hidden_states"], None
            some = run.select(values, "hidden_states")
            if entry is not None:
                if state.rule.policy == "project":
                    assert run.others is not None
                    left_out = rows_of(values, run.others, len(x_BTD))
                    others = (run.others, *self._project(state, cache, left_out))
                some[state.cache_name] = row_cache(cache, entry, state.index, run.rows, others)
            return x_BTD.index_copy(0, run.rows, _read(run, super().forward(**some), False))  # type: ignore[misc]
        finally:
            if isinstance(entry, ExitLayer):
                entry.swap = None

    def _project(self, state: BlockState, cache: Any, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The block's own keys and values [B, H, T, E] of states."""
        stand_in, layer = capture(cache, state.index)
        try:
            super().forward(**{**values, state.cache_name: stand_in})  # type: ignore[misc]
        except StoredError:
            assert layer.keys is not None and layer.values is not None
            return layer.keys, layer.values
        raise RuntimeError(f"{type(self).__name__} stored no keys and values in its entry of the cache.")


def _pass_by(state: BlockState, entry: ExitLayer, cache: Any, values: dict[str, Any]) -> None:
    """Note or store what the policy asks for, for tokens that have all exited."""
    x_BTD = values["hidden_states"]
    if state.rule.policy == "project":
        entry.owe(x_BTD, _per_token(values, len(x_BTD)))
        return
    keys, values_BHTE = last_entries(exit_layer(cache, state.index - 1), x_BTD.shape[1])
    if state.rule.policy == "hole":
        keys, values_BHTE = torch.zeros_like(keys), torch.zeros_like(values_BHTE)
    entry.update(keys, values_BHTE)


def _per_token(values: dict[str, Any], batch: int) -> PerToken:
    def whole(value: Tensor) -> Tensor:
        return value.expand(batch, *value.shape[1:])

    names = [name for name in PER_TOKEN_ARGUMENTS if name != "cache_position"]  # [T], the same for all rows
    found = {name: values[name] for name in names if values.get(name) is not None}
    return {name: tuple(map(whole, v)) if isinstance(v, tuple) else whole(v) for name, v in found.items()}


def _with_holes(mask: Tensor | None, entry: DynamicLayer | None, run: Run, x_BTD: Tensor) -> Tensor | None:
    """The attention mask of a block without the places of tokens that left before it. (A token that left sees itself:
    nothing reads its result, and a row without any key would not be a number.)"""
    batch, count = x_BTD.shape[:2]
    if isinstance(entry, ExitLayer):
        entry.mark(run.active, count, batch, x_BTD.device)
        valid_BS = entry.valid
    else:
        valid_BS = run.active
    if valid_BS is None:
        return mask
    stored = valid_BS.shape[1]
    place_S = torch.arange(stored, device=x_BTD.device)
    query_T1 = place_S[stored - count :, None]
    seen_BTS = valid_BS[:, None] | (place_S == query_T1)
    if mask is None:
        return (seen_BTS & (place_S <= query_T1))[:, None]
    if mask.dim() != 4:
        raise ValueError(
            f"the decoder's attention mask is {tuple(mask.shape)}; kv='hole' needs [B, 1, T, S] masks, which the "
            "attention implementations 'eager' and 'sdpa' use."
        )
    if mask.dtype == torch.bool:
        return mask & seen_BTS[:, None]
    return mask.masked_fill(~seen_BTS[:, None], torch.finfo(mask.dtype).min)
