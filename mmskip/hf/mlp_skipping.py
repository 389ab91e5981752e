"""Leaving out the MLP of a block for the tokens that a rule says are done, or taking back what a block did to tokens
that it is a void for; attention always runs, so that the cache holds every token.

Shape suffixes: B batch, T tokens of a call, D width, N tokens whose MLP runs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.hf.calls import given_cache
from mmskip.hf.structure import added_by, parts_of
from mmskip.protocols import STATE, MlpRule, VoidRule
from mmskip.swap import Change, bind, bind_call, state_of
from mmskip.tracing import report_slot, report_visit

POLICY_KEY = "mmskip_policy"


@dataclass
class MlpState:
    """What a block and its MLP share in one call.

    Attributes:
        done_BT: the tokens whose MLP is left out; None: it runs for all.
        update_BTD: what the MLP, or the norm after it, added.
    """

    rule: MlpRule
    index: int
    done_BT: Tensor | None = None
    update_BTD: Tensor | None = None


class PolicyCall:
    """What travels from the root to the blocks of one forward: which tokens may be done, and which are; by block, which
    were when it ran first, so that gradient checkpointing repeats it with these."""

    __slots__ = ("came", "done_BT", "may_BT")

    def __init__(self, may_BT: Tensor) -> None:
        self.may_BT = may_BT
        self.done_BT = torch.zeros_like(may_BT)
        self.came: dict[int, Tensor] = {}


class PolicyRoot(nn.Module):
    """Mixin of the module that calls the blocks: counts the tokens of each row, padding aside."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rule: MlpRule = state_of(self, PolicyRoot)
        bound = bind(self, args, kwargs)
        inputs = bound.get("inputs_embeds")
        inputs = bound.get("input_ids") if inputs is None else inputs
        if inputs is None:
            raise ValueError("forward got neither input_ids nor inputs_embeds.")
        cache = given_cache(bound)
        place_BT = _places(inputs, cache, bound, rule.warmup)
        return super().forward(*args, **kwargs, **{POLICY_KEY: PolicyCall(place_BT >= rule.warmup)})


def _places(inputs: Tensor, cache: Any, bound: dict[str, Any], warmup: int) -> Tensor:
    """The place of each token in its row [B, T], padding aside."""
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


class PolicyBlock(nn.Module):
    """Mixin of a block: leaves out its MLP for tokens that are done, and asks the rule about the others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: MlpState = state_of(self, PolicyBlock)
        call: PolicyCall
        call, bound = bind_call(self, POLICY_KEY, f"block.{state.index} got no tokens", args, kwargs)
        x_BTD = bound.pop("hidden_states")
        done_BT = call.came.setdefault(state.index, call.done_BT).to(x_BTD.device)
        state.done_BT = done_BT
        try:
            output = super().forward(x_BTD, **bound)
            y_BTD = output[0] if isinstance(output, tuple) else output
            assert state.update_BTD is not None
            now_BT = state.rule.done(y_BTD - state.update_BTD, y_BTD) & call.may_BT.to(x_BTD.device)
        finally:
            state.done_BT = state.update_BTD = None
        call.done_BT = done_BT | now_BT
        cache = given_cache(bound)
        report_slot(state.index)
        report_visit(state.index, x_BTD, True, True, False, cache, state.index, ~done_BT)
        return output


class PolicyMlp(nn.Module):
    """Mixin of the MLP of a block: runs on the tokens that are not done, and adds nothing to the others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: MlpState = state_of(self, PolicyMlp)
        x_BTD = args[0] if args else next(iter(kwargs.values()))
        if state.done_BT is None or not bool(state.done_BT.any()):
            output = super().forward(*args, **kwargs)
            state.update_BTD = output[0] if isinstance(output, tuple) else output
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


class PolicyAdded(nn.Module):
    """Mixin of the norm after an MLP, whose output is what the block adds."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: MlpState = state_of(self, PolicyAdded)
        state.update_BTD = super().forward(*args, **kwargs)
        return state.update_BTD


def policy_changes(view: Any, rule: MlpRule, chosen: range) -> list[Change]:
    """The changes by which the MLPs of the blocks `chosen` are left out as `rule` says.

    Raises:
        ValueError: a block has no module for its MLP alone, or one that returns more than its output.
    """
    changes = []
    for index in chosen:
        block = view.blocks[index]
        _, mlp = parts_of(block)
        if mlp is None or view.kinds[index] == STATE:
            raise ValueError(
                f"{view.site(index)} ({type(block).__name__}) has no attention and a single module for its MLP; this "
                "policy does not apply to it."
            )
        state = MlpState(rule, index)
        changes.append(Change(view.site(index), block, PolicyBlock, state))
        changes.append(Change(f"{view.site(index)}.mlp", mlp, PolicyMlp, state))
        if (added := added_by(block)) is not mlp:
            changes.append(Change(f"{view.site(index)}.mlp_norm", added, PolicyAdded, state))
    return [*changes, Change("decoder", view.root, PolicyRoot, rule)]


class VoidCall:
    """What travels through the blocks of one forward: what the rule remembers of each token; by block, what it did when
    the block ran first, so that gradient checkpointing repeats it with that."""

    __slots__ = ("came", "memory")

    def __init__(self) -> None:
        self.memory: Any = None
        self.came: dict[int, Any] = {}


class VoidRoot(nn.Module):
    """Mixin of the module that calls the blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs, **{POLICY_KEY: VoidCall()})


class VoidBlock(nn.Module):
    """Mixin of a block: it runs, and what it did to tokens it is a void for is taken back."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rule, index = state_of(self, VoidBlock)
        call: VoidCall
        call, bound = bind_call(self, POLICY_KEY, f"block.{index} got no tokens", args, kwargs)
        x_BTD = bound.pop("hidden_states")
        output = super().forward(x_BTD, **bound)
        y_BTD = output[0] if isinstance(output, tuple) else output
        memory = call.came.setdefault(index, call.memory)
        void_BT, call.memory = rule.voids(x_BTD.detach(), y_BTD.detach(), memory)
        y_BTD = torch.where(void_BT[..., None], x_BTD, y_BTD)
        return (y_BTD, *output[1:]) if isinstance(output, tuple) else y_BTD


def void_changes(view: Any, rule: VoidRule) -> list[Change]:
    """The changes by which the update of a block is taken back for the tokens that `rule` calls voids."""
    changes = [Change(view.site(index), block, VoidBlock, (rule, index)) for index, block in enumerate(view.blocks)]
    return [*changes, Change("decoder", view.root, VoidRoot, rule)]
