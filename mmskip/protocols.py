"""What mechanisms ask of a method, and methods of a view of a model."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmskip.plan import DepthPlan
from mmskip.swap import Change
from mmskip.tokens.groups import TokenGroups
from mmskip.tokens.selection import Selection

STATE = "state"
"""Kind of a block that carries a state from token to token (state space, linear attention, convolution) or has no
attention at all: it sees every token, so token routing leaves it dense."""


class View(Protocol):
    """What a family says of a model: its name, the module that stands for the whole model, and its sites."""

    family: str
    root: nn.Module


class TokenPolicy(Protocol):
    """What a method says of one block: which tokens it processes and how their update is weighted."""

    def prepare(self, groups: TokenGroups) -> None:
        """Called once per forward before the blocks run: the place for whatever must be known on the host."""

    def enter(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Tensor:
        """The hidden states the block starts from, for methods that rewrite tokens; else as they are."""

    def select(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Selection:
        """The tokens that the block processes."""

    def gate(self, block: nn.Module, x_BSD: Tensor, selection: Selection, groups: TokenGroups) -> Tensor | None:
        """Multiplier [B, S] of the update of the selected tokens; None means 1."""


class TokenView(View, Protocol):
    """A model whose blocks can process a subset of the tokens."""

    blocks: tuple[nn.Module, ...]
    windows: tuple[int | None, ...]

    @property
    def width(self) -> int:
        """Hidden width D."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""

    def attention_types(self) -> tuple[str, ...]:
        """The kind of attention of each block, or `STATE`; lengths and masks are read at the first block of a kind."""


class Speculator(Protocol):
    """What a method says of drafting, and what it is told.

    Attributes:
        draft_tokens: drafts per step at most.
        stop_below: a row drafts no further after a token of less probability.
        branches: tokens beside each draft at most, which the model may choose instead.
        branch_above: probability that such a token needs.
        exits: whether drafts may leave out the last block too.
        window_tokens: generated tokens that sets of parts are compared on.
        searching: whether another set should be tried.
        window: those tokens, kept by the decoding under way.
    """

    draft_tokens: int
    stop_below: float
    branches: int
    branch_above: float
    exits: bool
    window_tokens: int
    window: Any

    @property
    def searching(self) -> bool: ...

    def start(self, draft: Any) -> None:
        """Put the first set of parts into `draft.attn` and `draft.mlp`."""

    def timed(self, what: str) -> AbstractContextManager[None]:
        """Adds the seconds inside to `prefill`, `draft`, `verify`, `plain` (a step without drafts) or `search`."""

    def count(self, drafted: int, accepted: int, rows: int) -> None:
        """Told after each step: drafts, how many were accepted, and how many rows were decoding."""

    def trial(self, draft: Any, matchness: Callable[[], float]) -> None:
        """Change `draft` to the next set of parts, measure it, and keep the better one."""


class MlpRule(Protocol):
    """Which tokens need no further MLP.

    Attributes:
        warmup: tokens at the start of each row that are never done.
    """

    @property
    def warmup(self) -> int: ...

    def done(self, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        """BoolTensor [B, T] from the states before and after the MLP of a block."""


class VoidRule(Protocol):
    """Which blocks are voids for which tokens."""

    def voids(self, x_BTD: Tensor, y_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """BoolTensor [B, T] from the states before and after a block, and what is remembered of the blocks so far
        (None before the first)."""


class PolicyView(View, Protocol):
    """A model whose MLPs can be left out, or whose blocks can be taken back, token by token."""

    blocks: tuple[nn.Module, ...]

    def policy_changes(self, rule: MlpRule, chosen: range) -> list[Change]:
        """The changes by which the MLPs of some blocks are left out as `rule` says.

        Raises:
            ValueError: a block has no module for its MLP alone.
        """

    def void_changes(self, rule: VoidRule) -> list[Change]:
        """The changes by which what a block did is taken back for the tokens that `rule` calls voids."""

    def mlp_cosines(self, model: nn.Module, data: Any, chosen: range, warmup: int) -> Tensor:
        """Cosines [blocks, tokens] between the states before and after the MLP of some blocks."""


class PlanView(View, Protocol):
    """A model whose blocks can run by a plan."""

    blocks: tuple[nn.Module, ...]

    def attention_types(self) -> tuple[str, ...]:
        """The kind of attention of each block, or `STATE`."""

    def plan_changes(self, plan: DepthPlan) -> list[Change]:
        """The changes by which the blocks run as `plan` says.

        Raises:
            ValueError: the model cannot run this plan exactly.
        """

    def draft_units(self) -> list[tuple[int | None, int | None]]:
        """What a draft may leave out: indices of (attention, MLP), None where that runs."""

    def speculation_changes(self, speculator: Speculator) -> list[Change]:
        """The changes by which `generate` decodes by speculation.

        Raises:
            ValueError: the model cannot roll back.
        """

    def block_flops(self, index: int, part: str, keys: int) -> float:
        """FLOPs per token of `"attn"`, `"mlp"`, `"fill"` (keys and values alone) or `"block"` with so many keys."""

    def head_flops(self) -> float:
        """FLOPs of the output head per token."""


@dataclass(frozen=True)
class HeldBits:
    """The weights of a block's linear layers.

    Attributes:
        bits: of each; None: as they were.
        weights: how many.
        stored_bytes: that they take, scales included.
        original_bytes: that they took before.
        kept_bytes: of the original weights kept aside.
    """

    bits: int | None
    weights: int
    stored_bytes: int
    original_bytes: int
    kept_bytes: int


class BitsView(View, Protocol):
    """A model whose blocks can hold weights of few bits."""

    blocks: tuple[nn.Module, ...]

    def bits_changes(self, bits: Mapping[int, int], group: int | None, store: str, keep: bool) -> list[Change]:
        """The changes by which blocks hold their weights in so many bits, by block index.

        Raises:
            ValueError: a block cannot be served.
        """

    def bits_held(self) -> list[HeldBits]:
        """What the weights of each block take."""
