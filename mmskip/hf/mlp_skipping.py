"""Skip the MLP of tokens that a rule marks as done, or undo a block's update for tokens it does not change (LAC voids).

Attention always runs, so that the cache holds every token.

Shape suffixes: B batch, T tokens of a call, D width, N tokens whose MLP runs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.families.base import Site
from mmskip.hf.calls import given_cache, inputs_of
from mmskip.hf.structure import added_by
from mmskip.protocols import STATE, MlpRule, VoidRule
from mmskip.recording import Work, recorder, stored_bytes
from mmskip.swap import Change, around, bind, bind_call, state_of, states_of, with_states

CALL_KEY = "mmskip_tokens"


@dataclass
class MlpState:
    """Shared by a block and its MLP in one call.

    Attributes:
        index: of the block.
        done_BT: True for the tokens whose MLP is skipped; None: it runs for all.
        update_BTD: output of the MLP, or of the norm after it, which the block adds.
    """

    rule: MlpRule
    index: int
    done_BT: Tensor | None = None
    update_BTD: Tensor | None = None


class MlpCall:
    """Passed from the root to the blocks of one forward: which tokens may be done, and which are; by block, which were
    when it first ran, so that gradient checkpointing repeats it with the same ones."""

    __slots__ = ("came", "done_BT", "may_BT")

    def __init__(self, may_BT: Tensor) -> None:
        self.may_BT = may_BT
        self.done_BT = torch.zeros_like(may_BT)
        self.came: dict[int, Tensor] = {}


class MlpSkippingRoot(nn.Module):
    """Mixin of the module that calls the blocks: count the tokens of each row, without padding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rule: MlpRule = state_of(self, MlpSkippingRoot)
        bound = bind(self, args, kwargs)
        place_BT = _places(inputs_of(bound), given_cache(bound), bound, rule.warmup)
        return super().forward(*args, **kwargs, **{CALL_KEY: MlpCall(place_BT >= rule.warmup)})


def _places(inputs: Tensor, cache: Any, bound: dict[str, Any], warmup: int) -> Tensor:
    """Return the position of each token in its row [B, T], without padding."""
    batch, length = inputs.shape[:2]
    positions, mask = bound.get("position_ids"), bound.get("attention_mask")
    if positions is not None and positions.dim() == 2:
        return positions.to(inputs.device).expand(batch, length)
    if mask is None or not warmup:
        start = 0 if cache is None else cache.get_seq_length()
        return (torch.arange(length, device=inputs.device) + start).expand(batch, length)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            "warm-up tokens are counted by position_ids or by a 2-D padding mask; this call has neither. Pass "
            "position_ids."
        )
    return (mask.long().cumsum(-1) - 1)[:, -length:].to(inputs.device)


class MlpSkippingBlock(nn.Module):
    """Mixin of a block: skip its MLP for tokens that are done, and ask the rule about the others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: MlpState = state_of(self, MlpSkippingBlock)
        call: MlpCall
        call, bound = bind_call(self, CALL_KEY, f"block.{state.index} got no tokens", args, kwargs)
        x_BTD = bound.pop("hidden_states")
        done_BT = call.came.setdefault(state.index, call.done_BT).to(x_BTD.device)
        state.done_BT = done_BT
        try:
            output = super().forward(x_BTD, **bound)
            y_BTD = states_of(output)
            assert state.update_BTD is not None
            now_BT = state.rule.done(y_BTD - state.update_BTD, y_BTD) & call.may_BT.to(x_BTD.device)
        finally:
            state.done_BT = state.update_BTD = None
        call.done_BT = done_BT | now_BT
        cache = given_cache(bound)
        if (recording := recorder()) is not None:
            slots, through = x_BTD.shape[0] * x_BTD.shape[1], int((~done_BT).sum())
            recording.visit(self, Work(slots, slots, through, kv_bytes=stored_bytes(cache, state.index)))
        return output


class SkippedMlp(nn.Module):
    """Mixin of the MLP of a block: run on the tokens that are not done, and add nothing to the others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: MlpState = state_of(self, SkippedMlp)
        x_BTD = args[0] if args else next(iter(kwargs.values()))
        if state.done_BT is None or not bool(state.done_BT.any()):
            output = super().forward(*args, **kwargs)
            state.update_BTD = states_of(output)
            return output
        update_BTD = torch.zeros_like(x_BTD)
        rest: tuple[None, ...] = ()
        runs_BT = ~state.done_BT
        if bool(runs_BT.any()):
            output = super().forward(x_BTD[runs_BT][None])
            y_1ND, rest = (output[0], (None,) * (len(output) - 1)) if isinstance(output, tuple) else (output, ())
            update_BTD[runs_BT] = y_1ND[0]
        state.update_BTD = update_BTD
        return (update_BTD, *rest) if rest else update_BTD


class AddedByMlp(nn.Module):
    """Mixin of the norm after an MLP: its output is what the block adds."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: MlpState = state_of(self, AddedByMlp)
        state.update_BTD = super().forward(*args, **kwargs)
        return state.update_BTD


def mlp_changes(view: Any, rule: MlpRule, chosen: range) -> list[Change]:
    """Build the changes by which the MLPs of the blocks `chosen` are skipped as `rule` says.

    Raises:
        ValueError: a block has no module for its MLP alone, or no attention.
    """
    changes = []
    mlps = {site.index: site for site in view.sites("mlp")}
    for block in view.sites("block"):
        if block.index not in chosen:
            continue
        if block.index not in mlps or view.kinds[block.index] == STATE:
            raise ValueError(
                f"{block.name} ({type(block.module).__name__}) lacks an attention, or a single module for its MLP; its "
                "MLP cannot be skipped."
            )
        mlp, state = mlps[block.index], MlpState(rule, block.index)
        changes.append(around(block, MlpSkippingBlock, state, "mlp"))
        changes.append(around(mlp, SkippedMlp, state, "mlp"))
        if (added := added_by(block.module)) is not mlp.module:
            norm = Site(f"{block.name}.mlp_norm", "norm", added, block.index)
            changes.append(around(norm, AddedByMlp, state, "mlp"))
    return [*changes, Change("decoder", view.root, MlpSkippingRoot, rule)]


class VoidCall:
    """Passed through the blocks of one forward: the rule's memory of each token; by block, the memory when it first
    ran, so that gradient checkpointing repeats it with the same one."""

    __slots__ = ("came", "memory")

    def __init__(self) -> None:
        self.memory: Any = None
        self.came: dict[int, Any] = {}


class VoidRoot(nn.Module):
    """Mixin of the module that calls the blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs, **{CALL_KEY: VoidCall()})


class VoidBlock(nn.Module):
    """Mixin of a block: run it, then undo its update for the tokens that it is a void for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rule, index = state_of(self, VoidBlock)
        call: VoidCall
        call, bound = bind_call(self, CALL_KEY, f"block.{index} got no tokens", args, kwargs)
        x_BTD = bound.pop("hidden_states")
        output = super().forward(x_BTD, **bound)
        y_BTD = states_of(output)
        memory = call.came.setdefault(index, call.memory)
        void_BT, call.memory = rule.voids(x_BTD.detach(), y_BTD.detach(), memory)
        return with_states(output, torch.where(void_BT[..., None], x_BTD, y_BTD))


def void_changes(view: Any, rule: VoidRule) -> list[Change]:
    """Build the changes by which a block's update is undone for the tokens that `rule` calls voids."""
    changes = [around(site, VoidBlock, (rule, site.index), "update") for site in view.sites("block")]
    return [*changes, Change("decoder", view.root, VoidRoot, rule)]
