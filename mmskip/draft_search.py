"""Which parts drafts leave out, how the next set is searched for, and what decoding by speculation measured."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

STEPS = ("prefill", "draft", "verify", "plain", "search")
"""Phases that the seconds of a `Speculation` are counted by."""
Unit = tuple[int | None, int | None]
"""Parts that a draft omits together: indices of the blocks of (attention, MLP), None for a part that runs."""


@dataclass
class Speculation:
    """The state of a model that decodes by speculation, and what was measured since `apply_`.

    Attributes:
        config: a `SelfSpeculationConfig`.
        units: what a draft may leave out.
        costs: share of the decoding FLOPs of the model that each unit takes.
        seconds: by kind of step (`STEPS`); plain_s: of each step that was taken without drafts.
        passes: verifications; steps: verifications times rows, each of which yields the accepted drafts and one token.
        drafted, accepted: number of drafts.
        best, trials, stale: share of the window that the present set gets right, sets tried, those since a better one.
        chosen: indices of the units that drafts leave out now.
        window: tokens that sets are compared on, kept by the current decoding.
        tried: sets as 0/1 vectors, with their shares.
    """

    config: Any
    units: list[Unit]
    costs: list[float]
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    plain_s: list[float] = field(default_factory=list)
    steps: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    best: float | None = None
    trials: int = 0
    stale: int = 0
    chosen: frozenset[int] = frozenset()
    window: Any = None
    tried: list[tuple[list[int], float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draft_tokens, self.stop_below = self.config.draft_tokens, self.config.stop_below
        self.branches, self.branch_above = self.config.branches, self.config.branch_above
        self.exits = self.config.exit_after is not None
        self.window_tokens = self.config.window
        self._random = random.Random(self.config.seed)

    @property
    def searching(self) -> bool:
        """True if another set should be tried."""
        config = self.config
        done = self.trials >= config.max_trials or self.stale >= config.patience
        return config.search is not None and not done and (self.best is None or self.best <= config.enough)

    @property
    def draft_share(self) -> float:
        """Share of the model's decoding FLOPs that a draft takes."""
        return 1 - sum(self.costs[i] for i in self.chosen)

    def start(self, draft: Any) -> None:
        """Put the first set of parts into `draft`."""
        self._put(draft, first_set(self.config, self.units))

    def _put(self, draft: Any, chosen: frozenset[int]) -> None:
        self.chosen = chosen
        draft.attn = frozenset(self.units[i][0] for i in chosen if self.units[i][0] is not None)
        draft.mlp = frozenset(self.units[i][1] for i in chosen if self.units[i][1] is not None)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds inside to a kind of step."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begin
            self.seconds[what] += took
            if what == "plain":
                self.plain_s.append(took)

    def count(self, drafted: int, accepted: int, rows: int) -> None:
        """Record a step: drafts, how many were accepted, and how many rows were decoding."""
        self.drafted += drafted
        self.accepted += accepted
        self.steps += rows
        self.passes += 1

    def trial(self, draft: Any, matchness: Callable[[], float]) -> None:
        """Measure the next set of parts, and keep the better one."""
        incumbent = self.chosen
        candidate = incumbent if self.best is None else self._propose()
        self._put(draft, candidate)
        found = matchness()
        self.trials += 1
        self.tried.append(([int(i in candidate) for i in range(len(self.units))], found))
        if self.best is None or found > self.best:
            self.best, self.stale = found, 0
        else:
            self.stale += 1
            self._put(draft, incumbent)

    def _propose(self) -> frozenset[int]:
        size = skipped_units(self.config, len(self.units))
        if self.config.search == "bayes" and self.trials % self.config.bayes_every == 0:
            return gaussian_process_proposal(self.tried, size, self._random)
        return frozenset(self._random.sample(range(len(self.units)), size))

    @property
    def ideal_speedup(self) -> float:
        """Tokens per pass of the full model, drafts counted by their share: the speed-up where a pass takes as long for
        several tokens as for one. Search is not counted."""
        passes = self.steps + self.drafted * self.draft_share
        return (self.accepted + self.steps) / passes if passes else 1.0

    def left_out(self, part: int) -> list[int]:
        """Return the blocks whose attention (0) or MLP (1) a draft leaves out."""
        return sorted(index for index in (self.units[i][part] for i in self.chosen) if index is not None)

    @property
    def measured_speedup(self) -> float | None:
        """Seconds that plain steps would take for the same tokens (by the median of those taken), divided by those of
        drafts, verification and search; None before a plain step. The prompt is not counted."""
        if not self.plain_s or not self.steps:
            return None
        spent = sum(self.seconds[step] for step in ("draft", "verify", "plain", "search"))
        rows = self.steps / self.passes
        return (self.accepted + self.steps) / rows * statistics.median(self.plain_s) / spent

    def __str__(self) -> str:
        tokens, ideal = self.accepted + self.steps, self.ideal_speedup
        kept = self.accepted / self.drafted if self.drafted else 0.0
        lines = [
            f"{tokens} tokens in {self.steps} steps; {kept:.1%} of {self.drafted} drafts accepted",
            f"a draft takes {self.draft_share:.1%} of the FLOPs of a token; it leaves out the attention of blocks "
            f"{self.left_out(0)} and the MLP of {self.left_out(1)}",
            f"counted speed-up where a pass costs the same for one token and for several: {ideal:.2f}"
            + ("" if ideal > 1 else " - SLOWER than plain decoding"),
            "seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in self.seconds.items()),
        ]
        if self.measured_speedup is not None:
            fast = self.measured_speedup
            lines.append(
                f"measured against the {len(self.plain_s)} steps taken without drafts: {fast:.2f}"
                + ("" if fast > 1 else " - SLOWER than plain decoding")
            )
        if self.config.search is not None:
            lines.append(f"search: {self.trials} sets tried, best agrees on {self.best or 0:.1%} of the window")
        return "\n".join(lines)


def skipped_units(config: Any, count: int) -> int:
    """Return how many of `count` units a searched set leaves out."""
    return max(1, int(count * config.skip_share))


def first_set(config: Any, units: Sequence[Unit]) -> frozenset[int]:
    """Choose the set that drafting begins with: that of the config, or odd blocks up to the share.

    Raises:
        ValueError: the config names a part that cannot be left out.
    """
    if config.exit_after is not None:
        return frozenset(range(len(units)))
    if config.skip_attn is None or config.skip_mlp is None:
        odd = [i for i, unit in enumerate(units) if next(x for x in unit if x is not None) % 2 == 1]
        rest = [i for i in range(len(units)) if i not in odd]
        return frozenset((odd + rest)[: skipped_units(config, len(units))])
    chosen = frozenset(
        i
        for i, (attn, mlp) in enumerate(units)
        if (attn is None or attn in config.skip_attn) and (mlp is None or mlp in config.skip_mlp)
    )
    attn = {units[i][0] for i in chosen}
    mlp = {units[i][1] for i in chosen}
    for name, asked, found in (("skip_attn", config.skip_attn, attn), ("skip_mlp", config.skip_mlp, mlp)):
        lacking = sorted(set(asked) - found)
        if lacking:
            able = sorted({x for unit in units for x in unit if x is not None})
            raise ValueError(
                f"{name} holds {lacking}, which drafts cannot leave out alone; the first and the last block always "
                f"run, blocks to choose from are {able}."
            )
    return chosen


def gaussian_process_proposal(
    tried: Sequence[tuple[list[int], float]], size: int, source: random.Random, pool: int = 256, kappa: float = 2.5
) -> frozenset[int]:
    """Propose the set of `size` units with the highest upper confidence bound among random ones and neighbours of the
    best.

    Args:
        tried: sets as 0/1 vectors, with their scores.
    """
    import warnings

    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    count = len(tried[0][0])
    model = GaussianProcessRegressor(kernel=Matern(nu=2.5), alpha=1e-2, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.array([vector for vector, _ in tried[-200:]]), np.array([score for _, score in tried[-200:]]))
    best = max(tried, key=lambda item: item[1])[0]
    inside, outside = [i for i in range(count) if best[i]], [i for i in range(count) if not best[i]]
    sets = [frozenset(source.sample(range(count), size)) for _ in range(pool)]
    if len(inside) == size and outside:
        sets += [frozenset({*inside, source.choice(outside)} - {source.choice(inside)}) for _ in range(pool)]
    vectors = np.array([[int(i in chosen) for i in range(count)] for chosen in sets])
    mean, deviation = model.predict(vectors, return_std=True)
    return sets[int(np.argmax(mean + kappa * deviation))]
