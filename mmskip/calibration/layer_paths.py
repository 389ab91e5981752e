"""Search paths of layers by Monte Carlo tree search (CoLa, arXiv 2507.07996).

A state is a path: indices of blocks in the order they run. An action drops 1 to 4 neighbouring visits, or repeats 1 to
4 of them 1 to 4 more times. A child is chosen by Q / v + c sqrt(ln V / v) - lambda |P| / N, or, with a small chance,
drawn from the untried actions.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmskip.config import check_choice

MOST = 4
"""Most visits that one action drops or repeats, and most repeats."""
ACTIONS = ("skip", "loop", "both")
LayerPath = tuple[int, ...]
"""Block indices in the order they run."""


@dataclass(frozen=True)
class PathSettings:
    """Settings of the search for one sample.

    Attributes:
        actions: `"skip"`, `"loop"` or `"both"`.
        simulations: paths evaluated, >= 1.
        length_weight: lambda, the price of the full model's length, >= 0.
        curiosity: c, >= 0.
        explore: chance of an untried action where others were tried, in [0, 1].
        longest: most visits of a path, as a multiple of the blocks, >= 1.
    """

    actions: str = "both"
    simulations: int = 200
    length_weight: float = 5.0
    curiosity: float = math.sqrt(2)
    explore: float = 0.1
    longest: float = 2.0

    def __post_init__(self) -> None:
        check_choice("actions", self.actions, ACTIONS)
        bounds = {"simulations": (1, math.inf), "length_weight": (0, math.inf), "curiosity": (0, math.inf)}
        for name, (low, high) in {**bounds, "explore": (0, 1), "longest": (1, math.inf)}.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number from {low} to {high}.")


@dataclass(frozen=True)
class Scored:
    """A path and its reward; `length` counts visits."""

    path: LayerPath
    reward: float

    @property
    def length(self) -> int:
        """Number of visits."""
        return len(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {"path": list(self.path), "length": self.length, "reward": self.reward}


@dataclass
class _Node:
    path: LayerPath
    untried: list[LayerPath]
    visits: int = 0
    total: float = 0.0
    children: list["_Node"] = field(default_factory=list)


def neighbours(path: LayerPath, layers: int, actions: str = "both", longest: float = 2.0) -> list[LayerPath]:
    """List the paths that one action makes of a path, each once, in a fixed order."""
    found: dict[LayerPath, None] = {}
    for start in range(len(path)):
        for size in range(1, min(MOST, len(path) - start) + 1):
            end = start + size
            if actions != "loop" and size < len(path):
                found[path[:start] + path[end:]] = None
            if actions != "skip":
                for times in range(1, MOST + 1):
                    longer = path[:end] + path[start:end] * times + path[end:]
                    if len(longer) <= longest * layers:
                        found[longer] = None
    return list(found)


def pareto(tried: Iterable[Scored]) -> list[Scored]:
    """Return the paths that no other beats (no shorter one is as good, no better one as short), shortest first."""
    best: list[Scored] = []
    for scored in sorted(tried, key=lambda item: (item.length, -item.reward)):
        if not best or scored.reward > best[-1].reward:
            best.append(scored)
    return best


def search_paths(
    reward: Callable[[LayerPath], float | None], layers: int, settings: PathSettings, seed: int = 0
) -> list[Scored]:
    """Search from the full model; return the Pareto set of the paths evaluated, shortest first.

    Args:
        reward: path -> reward in [0, 1]; None where the model cannot run it. Called once per path.
        seed: of the random actions.
    """
    known: dict[LayerPath, float | None] = {}
    source = random.Random(seed)

    def value(path: LayerPath) -> float:
        if path not in known:
            known[path] = reward(path)
        return known[path] or 0.0

    def node(path: LayerPath) -> _Node:
        return _Node(path, neighbours(path, layers, settings.actions, settings.longest))

    root = node(tuple(range(layers)))
    value(root.path)
    for _ in range(settings.simulations):
        chain = _descend(root, layers, settings, source, node)
        gained = value(chain[-1].path)
        for visited in chain:
            visited.visits += 1
            visited.total += gained
    return pareto(Scored(path, gained) for path, gained in known.items() if gained is not None)


def _descend(
    root: _Node, layers: int, settings: PathSettings, source: random.Random, node: Callable[[LayerPath], _Node]
) -> list[_Node]:
    """Walk from the root to a node that is new, or has no action left; return the nodes."""
    chain = [root]
    while True:
        here = chain[-1]
        if here.untried and (not here.children or source.random() < settings.explore):
            here.children.append(node(here.untried.pop(source.randrange(len(here.untried)))))
            return [*chain, here.children[-1]]
        if not here.children:
            return chain
        chain.append(max(here.children, key=lambda child: _bound(child, here.visits, layers, settings)))


def _bound(child: _Node, visits: int, layers: int, settings: PathSettings) -> float:
    curious = settings.curiosity * math.sqrt(math.log(max(visits, 1)) / child.visits)
    return child.total / child.visits + curious - settings.length_weight * len(child.path) / layers


def shortest_as_good(found: Sequence[Scored], least: float) -> Scored | None:
    """Return the shortest path with at least this reward, or None."""
    return next((scored for scored in found if scored.reward >= least), None)
