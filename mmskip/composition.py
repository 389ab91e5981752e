"""Which methods compose: decided here alone, from what each claims, whatever the order in which they are applied.

A *claim* is a module and what of it a method changes (its aspect). Two methods that claim the same module conflict,
unless their aspects are listed in `TOGETHER` or `WITH_ALL`. Two whose aspects are listed in `APART` conflict on one
stack of blocks, whichever blocks they claim. `tests/contract/test_composition.py` tries every pair in both orders.

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

Of UNets: `skip` and `backbone` of a joint: what it takes from its two inputs (skip scales, FreeU); `steps` of a stage:
the sampling steps in which it runs (step caching). Of CNNs: `mask` of the input. Of any model: `module`: what stands in
a place (`swap.replace`), and `children`: that it has more of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

from torch import nn

from mmskip.swap import Change, Replaced

TOGETHER: frozenset[frozenset[str]] = frozenset({frozenset({"backbone", "skip"})})
"""Pairs of aspects of one module that compose exactly."""

WITH_ALL = frozenset({"weights", "children"})
"""Aspects that compose exactly with every other: neither how weights are stored nor a child more changes how a module
runs."""

APART: frozenset[frozenset[str]] = frozenset(
    {
        # exits and drafts own the cache and the order of the blocks of the whole stack
        *(frozenset({"exit", other}) for other in ("tokens", "probe", "order", "parts", "mlp", "update")),
        *(frozenset({"draft", other}) for other in ("tokens", "probe", "order", "parts", "mlp", "update", "exit")),
        # one plan says where each entry of the cache belongs
        frozenset({"order"}),
        frozenset({"order", "parts"}),
        frozenset({"parts"}),
        frozenset({"draft"}),
    }
)
"""Pairs of aspects that exclude each other in one stack of blocks, whichever blocks they change."""


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
    """Return the claims of a method, from its changes.

    A change without an aspect (of the root, which may carry many) claims nothing unless its site has a dot. A
    replacement also claims the module it replaces, which may carry a method.
    """
    found = []
    for change in changes:
        if change.aspect or "." in change.site:
            modules = [change.module, *([change.state.original] if isinstance(change.state, Replaced) else [])]
            found += [Claim(change.site, module, change.aspect or change.site) for module in modules]
    return tuple(found)


def check(config: Any, claims: Sequence[Claim], present: Iterable[tuple[Any, Sequence[Claim]]]) -> None:
    """Raise ValueError if `config` does not compose with a method that is applied. The message is the same in both
    orders.

    Args:
        present: (config, claims) of the methods applied already.
    """
    for earlier, held in present:
        pairs = [(claim, other) for claim in claims for other in held if _conflict(claim, other)]
        shared = sorted({site for pair in pairs if pair[0].module is pair[1].module for site in _sites(pair)})
        if not pairs:
            continue
        first, second = sorted((described(config), described(earlier)))
        if shared:
            apart = any(_apart(claim, other) for claim, other in pairs)
            advice = "." if apart else ", or give them different layers."
            raise ValueError(
                f"{first} and {second} do not compose{' on one stack' if apart else ''}: both claim "
                f"{', '.join(shared)}. Remove one of them (remove_){advice}"
            )
        raise ValueError(
            f"{first} and {second} do not compose on one model: they claim {_both(pairs)}. Remove one of them "
            "(remove_)."
        )


def described(config: Any) -> str:
    """Return a config with the settings that are not the default ones: `MoDConfig(keep=0.5, layers=(1,))`."""
    if not is_dataclass(config) or isinstance(config, type):
        return repr(config)
    changed = [f"{f.name}={getattr(config, f.name)!r}" for f in fields(config) if not _is_default(f, config)]
    return f"{type(config).__name__}({', '.join(changed)})"


def _is_default(f: Field[Any], config: Any) -> bool:
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    return default is not MISSING and bool(getattr(config, f.name) == default)


def _sites(claims: Iterable[Claim]) -> set[str]:
    return {claim.site for claim in claims}


def _both(pairs: Sequence[tuple[Claim, Claim]]) -> str:
    """One claim of each method, by name: the first pair in an order that does not depend on who came first."""
    first = min(sorted((claim.site, claim.aspect) for claim in pair) for pair in pairs)
    return " and ".join(f"{site} ({aspect})" for site, aspect in first)


def _conflict(first: Claim, second: Claim) -> bool:
    aspects = frozenset((first.aspect, second.aspect))
    if _apart(first, second):
        return True
    if first.module is not second.module:
        return False
    if first.aspect == second.aspect:
        return True
    if WITH_ALL & aspects or aspects in TOGETHER:
        return False
    # a claim without an aspect is of all that the site stands for, and of no other site of the module
    return (_named(first) and _named(second)) or first.site == second.site


def _apart(first: Claim, second: Claim) -> bool:
    """Whether the two exclude each other on their stack, whichever blocks they change."""
    return frozenset((first.aspect, second.aspect)) in APART and _stack(first) == _stack(second)


def _stack(claim: Claim) -> str:
    """Return the stack of blocks of a site: `block.3.attn` -> `block`."""
    return claim.site.partition(".")[0]


def _named(claim: Claim) -> bool:
    return claim.aspect != claim.site
