"""Blocks that are exited early: each runs on the states that still need it.

A decoder token that has exited keeps its state; later layers still have to store keys and values for it, by the cache
policy of its rule (`mmskip.cache_policy`: `recompute`, `copy` or `mask`). A layer that some tokens of a call still need
runs on all of them, or on the batch rows that hold such tokens where the rule says that this pays. A layer that no
token needs does not run.

Shape suffixes: B batch, N rows that run, H heads, T tokens of the call, S stored tokens, E head width, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from mmskip.exits.rules import ExitRule, may_exit
from mmskip.exits.runs import Run, rows_of
from mmskip.hf.calls import CACHE_ARGUMENTS, CACHE_NAME, PER_TOKEN_ARGUMENTS, StoredError, argument_names
from mmskip.hf.exits.cache import (
    ExitLayer,
    PerToken,
    capture,
    exit_layer,
    last_entries,
    row_cache,
    serves_rows,
)
from mmskip.swap import Change, around, bind, state_of


@dataclass(frozen=True)
class BlockState:
    """State of `DecoderExit` and `EncoderExit` on one block.

    Attributes:
        index: of the block in its stack.
        cache_name, x_name: the block's arguments that take the cache and the states.
        may_exit: whether states may exit after this block.
        recomputes: whether exited tokens get the block's own keys and values.
    """

    index: int
    rule: ExitRule
    run: Run
    cache_name: str = CACHE_NAME
    x_name: str = "hidden_states"
    may_exit: bool = field(init=False)
    recomputes: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "may_exit", may_exit(self.rule, self.index + 1))
        object.__setattr__(self, "recomputes", self.rule.cache_policy == "recompute")

    @property
    def exit_runs(self) -> dict[str, Run]:
        """The forward under way or the latest one, by the name of the rule."""
        return {self.rule.name: self.run}


class EncoderExit:
    """Mixin of an encoder block: each sample exits alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState = state_of(self, EncoderExit)  # type: ignore[arg-type]
        if self.training:  # type: ignore[attr-defined]
            state.run.exits = None
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        values = bind(self, args, kwargs)  # type: ignore[arg-type]
        y_BTD = encode(super().forward, state.run, state.rule, state.index, values, state.x_name)  # type: ignore[misc]
        state.run.record(self, state.index, state.rule.name)  # type: ignore[arg-type]
        return state.run.output(state.index, y_BTD)


def encode(
    call: Any, run: Run, rule: ExitRule, index: int, values: dict[str, Any], x_name: str = "hidden_states"
) -> Tensor:
    """Return the states [B, T, D] after encoder block `index`, whose own forward is `call`."""
    x_BTD = values[x_name]
    if index == 0:
        mask_BT = real_tokens(values.get("attention_mask", values.get("attn_mask")), x_BTD)
        run.start(x_BTD.shape[:1], x_BTD.device, rule.begin(mask_BT, 0, None))
    if not run.num_active:
        return x_BTD
    if run.rows is None:
        y_BTD = run.keep(run.read(call(**values)), x_BTD)
    else:
        some = run.select(values, x_name)
        y_BTD = x_BTD.index_copy(0, run.rows, run.read(call(**some), False))
    if may_exit(rule, index + 1):
        run.stop(index + 1, y_BTD, x_BTD, rule)
    return y_BTD


def real_tokens(mask: Tensor | None, x_BTD: Tensor) -> Tensor | None:
    """Return which tokens are no padding, [B, T]: those that any query sees, under a bidirectional, windowed or causal
    mask. None where the mask is the same for all rows. (The text towers of CLIP are called without a padding mask:
    whatever follows the end of a text counts as its tokens.)

    Args:
        mask: a block's argument, boolean or added to the scores: [B, 1, T, T], or [B * H, T, T] and [T, T] of
            open_clip.

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
    """Mixin of a decoder block: each token exits alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState = state_of(self, DecoderExit)  # type: ignore[arg-type]
        if self.training:  # type: ignore[attr-defined]
            state.run.exits = None
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        values, run, index = bind(self, args, kwargs), state.run, state.index  # type: ignore[arg-type]
        x_BTD, cache = values["hidden_states"], values.get(state.cache_name)
        if index == 0:
            past = 0 if cache is None else exit_layer(cache, 0).get_seq_length()
            kept = cache is not None and state.rule.decides_once
            memory: Any = exit_layer(cache, state.rule.exit_layers[0]) if kept else None
            run.start(x_BTD.shape[:2], x_BTD.device, state.rule.begin(None, past, memory), past)
        entry = None if cache is None else exit_layer(cache, index)
        if run.active is None and state.recomputes and not (isinstance(entry, ExitLayer) and entry.deferred):
            y_BTD = run.read(super().forward(**values))  # type: ignore[misc]  # no token has exited: as it is
        else:
            y_BTD = self._after_exits(state, entry, values)
        if state.may_exit and run.num_active:
            run.stop(index + 1, y_BTD, x_BTD, state.rule)
        run.record(self, index, state.rule.name)  # type: ignore[arg-type]
        return run.output(index, y_BTD)

    def _after_exits(self, state: BlockState, entry: DynamicLayer | None, values: dict[str, Any]) -> Tensor:
        """Return the states [B, T, D] after the block, some of which may have exited, in this call or before."""
        run, cache, policy = state.run, values.get(state.cache_name), state.rule.cache_policy
        x_BTD = values["hidden_states"]
        if cache is None and policy == "copy":
            if run.cache is None:
                crosses = values.get("encoder_hidden_states") is not None
                run.cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if crosses else DynamicCache()
            cache = values[state.cache_name] = run.cache
            entry = exit_layer(cache, state.index)
        if state.index and policy == "mask":
            values["attention_mask"] = _without_exited(values.get("attention_mask"), entry, run, x_BTD)
        if not run.num_active:
            if isinstance(entry, ExitLayer):
                _skip(state, entry, cache, values)
            return x_BTD
        if isinstance(entry, ExitLayer) and entry.deferred:
            states_BTD, per_token = entry.pop_deferred()
            entry.update(*self._recompute(state, cache, {**values, **per_token, "hidden_states": states_BTD}))
        return run.keep(self._run(state, entry, cache, values), x_BTD)

    def _run(self, state: BlockState, entry: DynamicLayer | None, cache: Any, values: dict[str, Any]) -> Tensor:
        """Return the states [B, T, D] after the block, which runs on all rows or on those that need it."""
        run, copies = state.run, state.rule.cache_policy == "copy"
        if isinstance(entry, ExitLayer) and copies and run.active is not None:
            entry.copy_from = run.active, exit_layer(cache, state.index - 1)
        try:
            if run.rows is None or not serves_rows(cache, entry, state.index):
                return run.read(super().forward(**values))  # type: ignore[misc]
            x_BTD, others = values["hidden_states"], None
            some = run.select(values, "hidden_states")
            if entry is not None:
                if state.recomputes:
                    assert run.others is not None
                    exited = rows_of(values, run.others, len(x_BTD))
                    others = (run.others, *self._recompute(state, cache, exited))
                some[state.cache_name] = row_cache(cache, entry, state.index, run.rows, others)
            return x_BTD.index_copy(0, run.rows, run.read(super().forward(**some), False))  # type: ignore[misc]
        finally:
            if isinstance(entry, ExitLayer):
                entry.copy_from = None

    def _recompute(self, state: BlockState, cache: Any, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the block's own keys and values [B, H, T, E] of states."""
        stand_in, layer = capture(cache, state.index)
        try:
            super().forward(**{**values, state.cache_name: stand_in})  # type: ignore[misc]
        except StoredError:
            assert layer.keys is not None and layer.values is not None
            state.run.filled += layer.keys.shape[0] * layer.keys.shape[-2]
            return layer.keys, layer.values
        raise RuntimeError(f"{type(self).__name__} stored no keys and values in its entry of the cache.")


def _skip(state: BlockState, entry: ExitLayer, cache: Any, values: dict[str, Any]) -> None:
    """Store or defer the entries of a call whose tokens have all exited."""
    x_BTD = values["hidden_states"]
    if state.recomputes:
        entry.defer(x_BTD, _per_token(values, len(x_BTD)))
        return
    keys, values_BHTE = last_entries(exit_layer(cache, state.index - 1), x_BTD.shape[1])
    if state.rule.cache_policy == "mask":
        keys, values_BHTE = torch.zeros_like(keys), torch.zeros_like(values_BHTE)
    entry.update(keys, values_BHTE)


def _per_token(values: dict[str, Any], batch: int) -> PerToken:
    def all_rows(value: Tensor) -> Tensor:
        return value.expand(batch, *value.shape[1:])

    names = [name for name in PER_TOKEN_ARGUMENTS if name != "cache_position"]  # [T], the same for all rows
    found = {name: values[name] for name in names if values.get(name) is not None}
    return {name: tuple(map(all_rows, v)) if isinstance(v, tuple) else all_rows(v) for name, v in found.items()}


def _without_exited(mask: Tensor | None, entry: DynamicLayer | None, run: Run, x_BTD: Tensor) -> Tensor | None:
    """Mask the places of tokens that exited before this block. (An exited token sees itself: nothing reads its result,
    and a row without any key would give NaN.)"""
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
            f"the decoder's attention mask is {tuple(mask.shape)}; cache_policy='mask' needs [B, 1, T, S] masks, which "
            "the attention implementations 'eager' and 'sdpa' use."
        )
    if mask.dtype == torch.bool:
        return mask & seen_BTS[:, None]
    return mask.masked_fill(~seen_BTS[:, None], torch.finfo(mask.dtype).min)


def exit_changes(
    view: Any, stack: str, rule: ExitRule, children: Mapping[int, Mapping[str, nn.Module]] | None = None
) -> list[Change]:
    """Return the changes by which states exit a stack of blocks early: tokens where the rule has a cache policy,
    samples where it has none.

    Args:
        view: of any family that lists blocks.
        stack: the name of the stack in `view.stacks`.
        rule: after which layers states may exit, and when.
        children: new modules of blocks, by index in the stack and name (`mmskip_...`).

    Raises:
        ValueError: the cache of a decoder's layers cannot keep entries for exited tokens.
    """
    sites = [site for site in view.sites("block") if site.stack == stack]
    per_token, run, changes = rule.cache_policy is not None, Run(len(sites)), []
    if per_token:
        _check_full_attention(view)
    for site in sites:
        names = argument_names(site.module) if per_token else ()
        cache_name = next((name for name in CACHE_ARGUMENTS if name in names), CACHE_NAME)
        state = BlockState(site.index, rule, run, cache_name, site.argument or "hidden_states")
        mixin = DecoderExit if per_token else EncoderExit
        changes.append(around(site, mixin, state, "exit", (children or {}).get(site.index)))
    return changes


def _check_full_attention(view: Any) -> None:
    other = sorted({kind for kind in getattr(view, "kinds", ()) if kind != "full"})
    if other:
        raise ValueError(
            f"{type(view.root).__name__} has layers with {' and '.join(other)} attention; early exit serves full "
            "attention, whose cache keeps every token."
        )
