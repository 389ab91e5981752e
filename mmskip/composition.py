"""Which methods compose: decided here alone, from what each claims, whatever the order in which they are applied.

A *claim* is a module and what of it a method changes (its aspect). Two methods that claim the same module conflict,
unless their aspects are listed in `TOGETHER`.

Aspects of decoders:

- `tokens` of a block: which tokens of a call it processes (mixture of depths, token reduction);
- `probe` of a block: its attention is read while it runs (token reduction by attention, fitting routers);
- `attn` of a self-attention: which attention function it calls;
- `order` of a block, `parts` of its attention or MLP: whether and when they run (layer plans);
- `mlp` of a block and its MLP: the tokens for which the MLP runs (FFN skipping);
- `update` of a block: the tokens for which its update counts (LAC);
- `draft` of a block, its attention or MLP: whether they run in a draft (self-speculation);
- `exit` of a block: the tokens, or samples, for which it still runs (early exit);
- `weights` of a block: how they are stored (bits).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmskip.swap import Change

TOGETHER: frozenset[frozenset[str]] = frozenset({frozenset({"backbone", "skip"})})
"""Pairs of aspects of one module that compose exactly."""

WITH_ALL = frozenset({"weights"})
"""Aspects that compose exactly with every other: how a block's weights are stored changes nothing of how it runs."""


@dataclass(frozen=True)
class Claim:
    """A module and what of it a method changes.

    Attributes:
        site: name of the place.
        module: what stands there.
        aspect: what of it changes.
    """

    site: str
    module: nn.Module
    aspect: str


@dataclass(frozen=True)
class Applied:
    """One method on a model: its config, the family that took it, and what it claims."""

    config: Any
    family: str
    claims: tuple[Claim, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites claimed."""
        return tuple(claim.site for claim in self.claims)


def claims_of(changes: Iterable[Change]) -> tuple[Claim, ...]:
    """What a method claims by its changes. A change without an aspect (of the root, which may carry many) claims
    nothing unless its site has a dot."""
    return tuple(
        Claim(change.site, change.module, change.aspect or change.site)
        for change in changes
        if change.aspect or "." in change.site
    )


def check(config: Any, claims: Sequence[Claim], present: Iterable[tuple[Any, Sequence[Claim]]]) -> None:
    """Raise ValueError if `config` claims what a method that is applied already holds.

    Args:
        present: (config, claims) of the methods applied already.
    """
    for earlier, held in present:
        clash = sorted({claim.site for claim in claims if any(_conflict(claim, other) for other in held)})
        if clash:
            raise ValueError(
                f"{type(config).__name__} claims {', '.join(clash)}, which {earlier!r} holds already; "
                "remove_ that method first, or choose other layers."
            )


def _conflict(first: Claim, second: Claim) -> bool:
    if first.module is not second.module:
        return False
    if first.aspect == second.aspect:
        return True
    if WITH_ALL & {first.aspect, second.aspect} or frozenset((first.aspect, second.aspect)) in TOGETHER:
        return False
    # a claim without an aspect is of all that the site stands for, and of no other site of the module
    return (_named(first) and _named(second)) or first.site == second.site


def _named(claim: Claim) -> bool:
    return claim.aspect != claim.site
