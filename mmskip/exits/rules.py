"""Exit rules: after which layers a state may exit a stack, and when it does.

A rule is plain settings and no model: `mmskip.hf.exits` runs blocks by it. `TokenRule` decides for each token of a
decoder, `SampleRule` for each sample of an encoder, `FixedRule` lets all states exit after one layer.

Shape suffixes: B batch, T tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mmskip.exits.criteria import SampleScores, TokenScores, decayed, is_single
from mmskip.exits.heads import ExitHead

MODALITIES = ("image", "text")
COMPACT = ("auto", "never", "always")
Decide = Callable[[Tensor, Tensor], Tensor | bool]


class Memory(Protocol):
    """Decisions that hold for all later tokens of a row, kept between the calls of a decoder.

    Attributes:
        row_exits: rows that exit early, boolean [B]; None: not decided yet.
        all_exit: whether all rows do (True) or none does (False), known on the host; None: they differ.
    """

    row_exits: Tensor | None
    all_exit: bool | None


class ExitRule(Protocol):
    """After which layers states may exit one stack of blocks, and when.

    Attributes:
        name: which stack the rule controls: `decoder`, `encoder`, `image` or `text`.
        exit_layers: layers after which an exit is decided, counted from 1, below the depth.
        last_layer: layer after which every remaining state exits; None: the last one.
        cache_policy: how an exited token's keys and values are stored, `recompute`, `copy` or `mask`; None: the stack
            keeps none (an encoder), and samples exit instead of tokens.
        decides_once: whether the first token of a row decides for all tokens of the row.
    """

    @property
    def name(self) -> str: ...

    @property
    def exit_layers(self) -> tuple[int, ...]: ...

    @property
    def last_layer(self) -> int | None: ...

    @property
    def cache_policy(self) -> str | None: ...

    @property
    def decides_once(self) -> bool: ...

    def begin(self, mask_BT: Tensor | None, past: int, memory: Memory | None) -> Decide:
        """Start one forward.

        Args:
            mask_BT: of an encoder, False on padding; None: no padding.
            past: tokens before the first one of the call.
            memory: of a decoder that decides once; None: the call stands alone.

        Returns:
            A function called after each layer in `exit_layers` with the states after and before it, [B, T, D]. It
            returns which states exit: boolean [B, T] ([B] for an encoder), or one bool for all of them.
        """

    def compacts(self, num_active: int, rows: int) -> bool:
        """Whether a layer runs on the `num_active` of `rows` batch rows that still need it, instead of on all."""


def may_exit(rule: ExitRule, layers: int) -> bool:
    """Return whether states may exit after `layers` layers have run."""
    return layers == rule.last_layer or layers in rule.exit_layers


@dataclass(frozen=True)
class Compaction:
    """When rows that have exited are removed from a layer's batch.

    The layer's time is assumed to grow with its rows, and removing and restoring rows to cost `overhead` of the layer's
    time for all rows: it pays where num_active / rows + overhead < 1.

    Attributes:
        mode: one of `COMPACT`.
        overhead: share of the layer's time, in [0, 1].
    """

    mode: str = "auto"
    overhead: float = 0.25

    def __call__(self, num_active: int, rows: int) -> bool:
        """Return whether a layer runs on the `num_active` of `rows` rows that need it."""
        return self.mode == "always" or (self.mode == "auto" and num_active / rows + self.overhead < 1)


@dataclass(frozen=True)
class Decay:
    """CALM's threshold, strict for the first generated tokens; see `mmskip.exits.decayed`.

    Attributes:
        share: beta, the constant part, in (0, 1].
        speed: tau, > 0.
        steps: maximum number of generated tokens.
    """

    share: float
    speed: float = 1.0
    steps: int = 16


@dataclass(frozen=True)
class TokenRule:
    """When a token exits a decoder.

    Attributes:
        criterion, threshold: see `mmskip.exits`.
        exit_layers, cache_policy, last_layer, decides_once, name: see `ExitRule`.
        compacts: when rows are removed from the batch.
        head: states -> logits, for the criteria that read them.
        heads: of criterion `learned`, one per exit layer.
        decay: None: the threshold is constant.
    """

    criterion: str
    threshold: float
    exit_layers: tuple[int, ...]
    cache_policy: str
    compacts: Compaction
    head: Callable[[Tensor], Tensor] | None = None
    heads: tuple[ExitHead, ...] = ()
    last_layer: int | None = None
    decay: Decay | None = None
    decides_once: bool = False
    name: str = "decoder"

    def begin(self, mask_BT: Tensor | None, past: int, memory: Memory | None) -> Decide:
        """Start one forward; decisions are [B, T]."""
        scores, threshold, decay = TokenScores(self.criterion, self.head, self.heads), self.threshold, self.decay

        def decide(after_BTD: Tensor, before_BTD: Tensor) -> Tensor | bool:
            batch, count = after_BTD.shape[:2]
            one = is_single(after_BTD, batch * count)
            score: Any = (scores.single if one else scores)(after_BTD, before_BTD)
            if self.criterion == "patience":
                return score >= threshold
            if decay is None:
                return score > threshold
            position_T = torch.arange(past, past + count, device=after_BTD.device)
            limit_T = decayed(threshold, decay.share, decay.speed, decay.steps, position_T)
            return score > (limit_T.item() if one else limit_T)

        return partial(_decide_once, decide, memory) if self.decides_once else decide


def _decide_once(decide: Decide, memory: Memory | None, after_BTD: Tensor, before_BTD: Tensor) -> Tensor | bool:
    """Decide [B, T] by the first token of each row; `memory` keeps that for later calls."""
    known, exits_B = (None, None) if memory is None else (memory.all_exit, memory.row_exits)
    if exits_B is None:
        first = decide(after_BTD[:, :1], before_BTD[:, :1])
        exits_B = torch.as_tensor(first, device=after_BTD.device).view(-1)
        known = bool(exits_B.all()) if bool((exits_B == exits_B[0]).all()) else None
        if memory is not None:
            memory.row_exits, memory.all_exit = exits_B, known
    return exits_B[:, None].expand(after_BTD.shape[:2]) if known is None else known


@dataclass(frozen=True)
class SampleRule:
    """When a sample, or one modality of it, exits an encoder. Attributes as those of `TokenRule`."""

    criterion: str
    threshold: float
    exit_layers: tuple[int, ...]
    compacts: Compaction
    heads: tuple[ExitHead, ...] = ()
    last_layer: int | None = None
    name: str = "encoder"
    cache_policy: str | None = None
    decides_once: bool = False

    def begin(self, mask_BT: Tensor | None, past: int, memory: Memory | None) -> Decide:
        """Start one forward; decisions are [B]."""
        scores = SampleScores(self.criterion, mask_BT, self.heads)

        def decide(after_BTD: Tensor, before_BTD: Tensor) -> Tensor | bool:
            one = is_single(after_BTD, len(after_BTD))
            score: Any = (scores.single if one else scores)(after_BTD, before_BTD)
            return score > self.threshold

        return decide


@dataclass(frozen=True)
class FixedRule:
    """All states exit after the same layer; nothing is decided while the model runs."""

    last_layer: int
    name: str
    cache_policy: str | None = None
    exit_layers: tuple[int, ...] = ()
    decides_once: bool = False

    def begin(self, mask_BT: Tensor | None, past: int, memory: Memory | None) -> Decide:
        """Never decides: there are no `exit_layers`."""
        return lambda after_BTD, before_BTD: False

    def compacts(self, num_active: int, rows: int) -> bool:
        """Rows never differ."""
        return False
