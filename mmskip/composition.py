"""Which methods compose: decided here alone, from what each claims, whatever the order in which they are applied.

A *claim* is a module and what of it a method changes (its aspect). Two methods that claim the same module conflict,
unless their aspects are listed in `TOGETHER`.

Aspects of decoders:

- `tokens` of a block: which tokens of a call it processes (mixture of depths, token reduction);
- `probe` of a block: its attention is read while it runs (token reduction by attention, fitting routers);
- `attn` of a self-attention: which attention function it calls.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmskip.swap import Change

TOGETHER: frozenset[frozenset[str]] = frozenset({frozenset({"backbone", "skip"})})
"""Pairs of aspects of one module that compose exactly."""


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
    return first.module is second.module and (
        first.aspect == second.aspect
        or first.site == second.site
        or (_named(first) and _named(second) and frozenset((first.aspect, second.aspect)) not in TOGETHER)
    )


def _named(claim: Claim) -> bool:
    return claim.aspect != claim.site
