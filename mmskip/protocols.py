"""Interfaces between methods, the mechanisms that carry them out, and views of models."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmskip.tokens.groups import TokenGroups
from mmskip.tokens.selection import Selection

STATE = "state"
"""Kind of a block that carries a state from token to token (state space, linear attention, convolution) or has no
attention: it must see every token, so token routing keeps it dense."""


class View(Protocol):
    """The part of `mmskip.families.base.View` that methods use: the family's name and the root module."""

    family: str
    root: nn.Module


class TokenPolicy(Protocol):
    """Chooses the tokens that one block processes, and the weights of their updates."""

    def prepare(self, groups: TokenGroups) -> None:
        """Prepare a forward: called once, before the blocks run, to compute what the host must know."""

    def enter(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Tensor:
        """Return the hidden states [B, T, D] that the block starts from; most methods return them unchanged."""

    def select(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Selection:
        """Select the tokens that the block processes."""

    def gate(self, block: nn.Module, x_BSD: Tensor, selection: Selection, groups: TokenGroups) -> Tensor | None:
        """Return the multiplier [B, S] of the updates of the selected tokens; None: 1."""


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
        """Return the attention type of each block, or `STATE`; transformers reads lengths and masks at the first block
        of a type."""


class Speculator(Protocol):
    """Protocol of drafting: the settings of a method, and the results reported to it.

    Attributes:
        draft_tokens: drafts per step at most.
        stop_below: a row drafts no further after a token of lower probability.
        branches: alternatives beside each draft at most, which the model may choose instead.
        branch_above: probability that an alternative needs.
        exits: whether drafts may leave out the last block too.
        window_tokens: generated tokens that sets of parts are compared on.
        searching: whether another set should be tried.
        window: those tokens, kept by the current decoding.
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
        """Add the seconds inside to `prefill`, `draft`, `verify`, `plain` (a step without drafts) or `search`."""

    def count(self, drafted: int, accepted: int, rows: int) -> None:
        """Record a step: drafts, how many were accepted, and how many rows were decoding."""

    def trial(self, draft: Any, matchness: Callable[[], float]) -> None:
        """Change `draft` to the next set of parts, measure it, and keep the better one."""


class MlpRule(Protocol):
    """Says which tokens need no further MLP.

    Attributes:
        warmup: tokens at the start of each row that always need it.
    """

    @property
    def warmup(self) -> int: ...

    def done(self, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        """Return BoolTensor [B, T] from the states before and after the MLP of a block."""


class VoidRule(Protocol):
    """Says which blocks are voids for which tokens."""

    def voids(self, x_BTD: Tensor, y_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return BoolTensor [B, T] from the states before and after a block, and the memory of the blocks so far (None
        before the first)."""


class BlockView(View, Protocol):
    """A model whose blocks run one after the other."""

    blocks: tuple[nn.Module, ...]


class BlockMeter(Protocol):
    """Counts the blocks of a decoder, see `mmskip.hf.meter.DecoderMeter`."""

    def block_flops(self, index: int, part: str, keys: int) -> float:
        """FLOPs per token of `"attn"`, `"mlp"`, `"fill"` (keys and values alone) or `"block"` with so many keys."""

    def head_flops(self) -> float:
        """FLOPs of the output head per token."""


class CountedView(BlockView, Protocol):
    """A model whose blocks' FLOPs are known."""

    def meter(self) -> BlockMeter:
        """Return what counts the blocks."""
