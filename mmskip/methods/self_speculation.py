"""Self-speculative decoding with layers left out in the draft (SWIFT, arXiv 2410.06916): the same tokens, sooner.

The model drafts on its own cache without some attentions and MLPs, verifies the drafts in one pass of all layers, and
rolls back. Which parts are left out is searched for while decoding, on the tokens it generates.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from mmskip.composition import Applied
from mmskip.config import MethodConfig, check_choice, check_count, check_ratio
from mmskip.methods.layer_plan import CONTEXT
from mmskip.protocols import CountedView
from mmskip.registry import applied, apply_, register, remove_
from mmskip.reporting import MethodReport, register_report
from mmskip.swap import Change, states
from mmskip.utils.extras import check_installed

SEARCHES = (None, "random", "bayes")
PHASES = ("prefill", "draft", "verify", "plain", "search")
Unit = tuple[int | None, int | None]


@dataclass(frozen=True)
class SelfSpeculationConfig(MethodConfig):
    """Self-speculative decoding through `model.generate(...)`: greedy output equals that of the model, sampled output
    has its distribution.

    Args:
        skip_attn, skip_mlp: indices of blocks whose attention and whose MLP drafts leave out. None for both: the odd
            blocks first, up to `skip_share`. The first and the last block always run.
        exit_after: drafts leave the model after so many blocks, >= 1, and use its norm and head there (early-exit
            drafts); None: they leave out the sets above. No search then. Drafts of an encoder-decoder always leave its
            decoder early, by default behind half of its layers; rows of a batch accept equally many drafts.
        draft_tokens: drafts per step at most, >= 1.
        stop_below: a row drafts no further after a token of less probability than this, in [0, 1].
        branches: draft trees: tokens beside each draft at most, >= 0, which are verified in the same pass. 0: a chain.
        branch_above: probability that a token beside a draft needs, in [0, 1].
        skip_share: of the attentions and MLPs between the first and the last block, how many a searched set leaves
            out, in (0, 1].
        search: None: the set stays; `"random"`: each step tries a random set; `"bayes"`: every `bayes_every`-th comes
            from a Gaussian process by upper confidence bound (kappa 2.5), for which scikit-learn must be there (extra
            `search`).
        window: generated tokens the sets are compared on, >= 1. The cache in front of them is held until the search
            ends, without being copied.
        enough: the search ends when the best set agrees with the model on more than this share of the window.
        patience: it ends after so many sets without a better one, >= 1.
        max_trials: it ends after so many in all, >= 0.
        bayes_every: every which set comes from the Gaussian process, >= 1.
        seed: of the search.
    """

    skip_attn: Sequence[int] | None = None
    skip_mlp: Sequence[int] | None = None
    exit_after: int | None = None
    draft_tokens: int = 25
    stop_below: float = 0.8
    branches: int = 0
    branch_above: float = 0.05
    skip_share: float = 0.45
    search: str | None = None
    window: int = 32
    enough: float = 0.93
    patience: int = 300
    max_trials: int = 1000
    bayes_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.skip_attn is None) != (self.skip_mlp is None):
            raise ValueError("skip_attn and skip_mlp go together; pass () for the one that leaves nothing out.")
        for name in ("skip_attn", "skip_mlp"):
            if getattr(self, name) is not None:
                values = tuple(getattr(self, name))
                for value in values:
                    check_count(f"{name}: index", value)
                object.__setattr__(self, name, values)
        check_choice("search", self.search, SEARCHES)
        if self.exit_after is not None:
            check_count("exit_after", self.exit_after)
            if self.exit_after < 1 or self.skip_attn is not None or self.search is not None:
                raise ValueError(
                    f"exit_after is {self.exit_after}; expected a number of blocks >= 1, without skip_attn, skip_mlp "
                    "and search."
                )
        check_ratio("skip_share", self.skip_share)
        for name in ("draft_tokens", "window", "patience", "bayes_every"):
            check_count(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 0; expected an integer >= 1.")
        for name in ("max_trials", "seed", "branches"):
            check_count(name, getattr(self, name))
        for name in ("stop_below", "enough", "branch_above"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}; expected a number in [0, 1].")


@dataclass
class Speculation:
    """The state of a model that decodes by speculation, and what was measured since it began.

    Attributes:
        units: what a draft may leave out.
        costs: share of the decoding FLOPs of the model that each unit takes.
        seconds: by phase; plain_s: of each step that was taken without drafts.
        passes: verifications; steps: the same times rows, each of which gives the drafts accepted and one token more.
        drafted, accepted: drafts.
        best, trials, stale: share of the window that the present set gets right, sets tried, those since a better one.
    """

    config: SelfSpeculationConfig
    units: list[Unit]
    costs: list[float]
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
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
        """Whether another set should be tried."""
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
        """Adds the seconds inside to a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begin
            self.seconds[what] += took
            if what == "plain":
                self.plain_s.append(took)

    def count(self, drafted: int, accepted: int, rows: int) -> None:
        """Told after each step."""
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
        """Tokens per pass of the whole model, drafts counted by their share: the speed-up where a pass takes as long
        for several tokens as for one. Search is not counted."""
        passes = self.steps + self.drafted * self.draft_share
        return (self.accepted + self.steps) / passes if passes else 1.0

    def _left_out(self, part: int) -> list[int]:
        return sorted(index for index in (self.units[i][part] for i in self.chosen) if index is not None)

    @property
    def measured_speedup(self) -> float | None:
        """Seconds that plain steps would take for the same tokens, by the median of those taken, over the seconds that
        drafts, verification and search took; None before a plain step. The prompt is not counted."""
        if not self.plain_s or not self.steps:
            return None
        spent = sum(self.seconds[phase] for phase in ("draft", "verify", "plain", "search"))
        rows = self.steps / self.passes
        return (self.accepted + self.steps) / rows * statistics.median(self.plain_s) / spent

    def __str__(self) -> str:
        tokens, ideal = self.accepted + self.steps, self.ideal_speedup
        kept = self.accepted / self.drafted if self.drafted else 0.0
        lines = [
            f"{tokens} tokens in {self.steps} steps; {kept:.1%} of {self.drafted} drafts accepted",
            f"a draft takes {self.draft_share:.1%} of the FLOPs of a token; it leaves out the attention of blocks "
            f"{self._left_out(0)} and the MLP of {self._left_out(1)}",
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


def skipped_units(config: SelfSpeculationConfig, count: int) -> int:
    """How many of `count` attentions and MLPs a searched set leaves out."""
    return max(1, int(count * config.skip_share))


def first_set(config: SelfSpeculationConfig, units: Sequence[Unit]) -> frozenset[int]:
    """The set drafting begins with: that of the config, or odd blocks up to the share.

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
    """The set of `size` parts with the highest upper confidence bound among random ones and neighbours of the best.

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


@register(SelfSpeculationConfig, "decoder")
def self_speculation_decoder(config: SelfSpeculationConfig, view: CountedView) -> list[Change]:
    """The changes by which a decoder decodes by speculation."""
    from mmskip.hf.speculation.draft import draft_units
    from mmskip.hf.speculation.generator import speculation_changes

    if config.search == "bayes":
        check_installed("search", "sklearn", "search='bayes' (not search='random')")
    count = len(view.blocks)
    units: list[Unit] = draft_units(view)
    if config.exit_after is not None:
        if config.exit_after >= count:
            raise ValueError(f"exit_after is {config.exit_after}; this model has {count} blocks, drafts need fewer.")
        units = [(index, index) for index in range(config.exit_after, count)]
    meter = view.meter()
    total = meter.head_flops() + sum(meter.block_flops(i, "block", CONTEXT) for i in range(count))
    costs = []
    for attn, mlp in units:
        if attn == mlp and attn is not None:
            cost = meter.block_flops(attn, "block", CONTEXT)
        else:
            parts = ((attn, "attn"), (mlp, "mlp"))
            cost = sum(meter.block_flops(index, part, CONTEXT) for index, part in parts if index is not None)
        costs.append(cost / total)
    return speculation_changes(view, Speculation(config, units, costs))


@register(SelfSpeculationConfig, "encoder_decoder")
def self_speculation_encoder_decoder(config: SelfSpeculationConfig, view: Any) -> list[Change]:
    """The changes by which an encoder-decoder decodes by speculation: drafts leave its decoder early."""
    from mmskip.hf.speculation.early_exit_draft import speculation_changes

    if view.generator is None:
        raise ValueError(
            f"{type(view.root).__name__} has no output projection, which drafts need; apply to the model that has it "
            "(...ForConditionalGeneration)."
        )
    count = len(view.decoder)
    for name in ("skip_attn", "search", "branches"):
        if getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)!r}; drafts of an encoder-decoder leave it early: choose exit_after, "
                "and leave skip_attn, skip_mlp, search and branches out."
            )
    if config.exit_after is None:
        config = replace(config, skip_attn=None, skip_mlp=None, exit_after=max(1, count // 2))
    assert config.exit_after is not None
    if config.exit_after >= count:
        raise ValueError(f"exit_after is {config.exit_after}; this decoder has {count} layers, drafts need fewer.")
    sizes = [sum(p.numel() for p in block.parameters() if p.dim() > 1) for block in view.decoder]
    total = sum(sizes) + view.generator.get_output_embeddings().weight.numel()
    units: list[Unit] = [(index, index) for index in range(config.exit_after, count)]
    speculator = Speculation(config, units, [sizes[index] / total for index in range(config.exit_after, count)])
    return speculation_changes(view, speculator, config.exit_after)


@dataclass(frozen=True)
class SpeculationReport(MethodReport):
    """What decoding by speculation did since `apply_`.

    Attributes:
        tokens, steps, passes: tokens decoded, by how many steps (a pass counts one per row) and passes of the whole
            model.
        drafted, accepted: tokens that drafts proposed, and those that the model confirmed.
        draft_share: share of the FLOPs of a token that a draft takes.
        skipped_attn, skipped_mlp: indices of the blocks whose attention and MLP a draft leaves out.
        ideal_speedup: where a pass costs the same for one token and for several; measured_speedup: against the plain
            steps among those taken, None without one.
        seconds: by phase.
        trials: sets of blocks tried by the search.
        text: for people.
    """

    tokens: int
    steps: int
    passes: int
    drafted: int
    accepted: int
    draft_share: float
    skipped_attn: tuple[int, ...]
    skipped_mlp: tuple[int, ...]
    ideal_speedup: float
    measured_speedup: float | None
    seconds: dict[str, float]
    trials: int
    text: str

    def __str__(self) -> str:
        return self.text if self.steps else "nothing was decoded by speculation since apply_"


@register_report(SelfSpeculationConfig)
def speculation_report(record: Applied, model: nn.Module) -> SpeculationReport:
    """The report of one SelfSpeculationConfig."""
    done = speculation(model)
    return SpeculationReport(
        done.accepted + done.steps,
        done.steps,
        done.passes,
        done.drafted,
        done.accepted,
        done.draft_share,
        tuple(done._left_out(0)),
        tuple(done._left_out(1)),
        done.ideal_speedup,
        done.measured_speedup,
        dict(done.seconds),
        done.trials,
        str(done),
    )


def speculation(model: nn.Module) -> Speculation:
    """What decoding by speculation measured on `model` so far; `print` it.

    Raises:
        ValueError: no SelfSpeculationConfig is applied.
    """
    for state in states(model):
        found = getattr(state, "speculator", None)
        if isinstance(found, Speculation):
            return found
    raise ValueError(f"no SelfSpeculationConfig is applied to this {type(model).__name__}.")


def generate(model: Any, inputs: Tensor, config: SelfSpeculationConfig | None = None, **kwargs: Any) -> Any:
    """`model.generate(inputs, ...)` by self-speculation, with the same results.

    Args:
        model: a transformers decoder or encoder-decoder. Where it carries a SelfSpeculationConfig, that is used; else
            `config` is applied for this call.
        inputs: ids [B, T], or what an encoder reads (pixel values).
        config: None: the default.

    Raises:
        ValueError: the model or a setting is not served.
    """
    if any(isinstance(present, SelfSpeculationConfig) for present in applied(model)):
        if config is not None:
            raise ValueError(
                "the model carries a SelfSpeculationConfig already; leave config out, or remove_ that one."
            )
        return model.generate(inputs, **kwargs)
    if applied(model):
        raise ValueError(f"the model carries {applied(model)}; apply_ the SelfSpeculationConfig beside that instead.")
    apply_(model, SelfSpeculationConfig() if config is None else config)
    try:
        return model.generate(inputs, **kwargs)
    finally:
        remove_(model)
