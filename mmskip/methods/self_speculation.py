"""Self-speculative decoding with layers left out in the draft (SWIFT, arXiv 2410.06916): the same tokens, sooner.

The model drafts on its own cache without some attentions and MLPs, verifies the drafts in one pass of all layers, and
rolls back. The set of parts to leave out is searched for while decoding, on the tokens it generates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from mmskip.composition import Applied
from mmskip.config import MethodConfig, check_choice, check_count, check_indices, check_number, check_ratio
from mmskip.draft_search import Speculation, Unit
from mmskip.methods.layer_plan import CONTEXT
from mmskip.protocols import CountedView
from mmskip.registry import applied, apply_, register, remove_
from mmskip.reporting import MethodReport, register_report
from mmskip.swap import Change, states
from mmskip.utils.deprecated import warn_deprecated
from mmskip.utils.extras import check_installed

SEARCHES = (None, "random", "bayes")


@dataclass(frozen=True)
class SelfSpeculationConfig(MethodConfig):
    """Self-speculative decoding through `model.generate(...)`: greedy output equals that of the model, sampled output
    has its distribution.

    Args:
        skip_attn, skip_mlp: indices of blocks whose attention and whose MLP drafts leave out. None for both: the odd
            blocks first, up to `skip_share`. The first and the last block always run.
        exit_after: drafts exit after this many blocks, >= 1, and use the model's norm and head there (early-exit
            drafts); None: they leave out the sets above. It excludes a search. Drafts of an encoder-decoder always exit
            its decoder early, by default after half of its layers; rows of a batch accept equally many drafts.
        draft_tokens: drafts per step at most, >= 1.
        stop_below: a row drafts no further after a token of lower probability, in [0, 1].
        branches: draft trees: alternatives beside each draft at most, >= 0, verified in the same pass. 0: a chain.
        branch_above: probability that an alternative needs, in [0, 1].
        skip_share: share of the attentions and MLPs between the first and the last block that a searched set leaves
            out, in (0, 1].
        search: None: the set stays; `"random"`: each step tries a random set; `"bayes"`: every `bayes_every`-th set
            comes from a Gaussian process by upper confidence bound (kappa 2.5), which needs scikit-learn (extra
            `search`).
        window: generated tokens the sets are compared on, >= 1. The cache before them is held, without copies, until
            the search ends.
        enough: the search ends when the best set agrees with the model on more than this share of the window, in
            [0, 1].
        patience: it ends after this many sets without a better one, >= 1.
        max_trials: it ends after this many sets in all, >= 0.
        bayes_every: one set in this many comes from the Gaussian process, >= 1.
        seed: of the search, >= 0.

    Example:
        >>> SelfSpeculationConfig(skip_attn=(1, 3), skip_mlp=(), draft_tokens=8).skip_attn
        (1, 3)
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("draft",)

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
                object.__setattr__(self, name, check_indices(name, getattr(self, name), repeats=True))
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
            check_count(name, getattr(self, name), 1)
        for name in ("max_trials", "seed", "branches"):
            check_count(name, getattr(self, name))
        for name in ("stop_below", "enough", "branch_above"):
            check_number(name, getattr(self, name), 0, 1)


@register(SelfSpeculationConfig, "decoder")
def self_speculation_decoder(config: SelfSpeculationConfig, view: CountedView) -> list[Change]:
    """Build the changes by which a decoder decodes by speculation."""
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
    """Build the changes by which an encoder-decoder decodes by speculation: drafts exit its decoder early."""
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
                f"{name} is {getattr(config, name)!r}; drafts of an encoder-decoder exit it early: choose exit_after, "
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
    """Report of decoding by speculation since `apply_`.

    Attributes:
        tokens, steps, passes: tokens decoded, by how many steps (a pass counts one per row) and passes of the full
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
    """Report on one SelfSpeculationConfig."""
    done = speculation_of(model)
    return SpeculationReport(
        done.accepted + done.steps,
        done.steps,
        done.passes,
        done.drafted,
        done.accepted,
        done.draft_share,
        tuple(done.left_out(0)),
        tuple(done.left_out(1)),
        done.ideal_speedup,
        done.measured_speedup,
        dict(done.seconds),
        done.trials,
        str(done),
    )


def speculation_of(model: nn.Module) -> Speculation:
    """Return the live record of decoding by speculation on `model`; `mmskip.report(model)` is a snapshot of it.

    Raises:
        ValueError: no SelfSpeculationConfig is applied.
    """
    for state in states(model):
        found = getattr(state, "speculator", None)
        if isinstance(found, Speculation):
            return found
    raise ValueError(f"no SelfSpeculationConfig is applied to this {type(model).__name__}.")


def speculation(model: nn.Module) -> Speculation:
    """Deprecated: `mmskip.report(model)["SelfSpeculationConfig"]`."""
    warn_deprecated("mmskip.methods.self_speculation.speculation", "mmskip.report(model)['SelfSpeculationConfig']")
    return speculation_of(model)


def generate(model: Any, inputs: Tensor, config: SelfSpeculationConfig | None = None, **kwargs: Any) -> Any:
    """Deprecated: `apply_` a `SelfSpeculationConfig` and call `model.generate(inputs, ...)`. This does it for one call.

    Args:
        model: a transformers decoder or encoder-decoder. Where it carries a SelfSpeculationConfig, that is used; else
            `config` is applied for this call.
        inputs: ids [B, T], or what an encoder reads (pixel values).
        config: None: the default.

    Raises:
        ValueError: the model or a setting is not served.
    """
    warn_deprecated("mmskip.generate", "model.generate after mmskip.apply_(model, mmskip.SelfSpeculationConfig())")
    present = applied(model)
    if any(isinstance(carried, SelfSpeculationConfig) for carried in present):
        if config is not None:
            raise ValueError(
                "the model carries a SelfSpeculationConfig already; leave config out, or remove_ that one."
            )
        return model.generate(inputs, **kwargs)
    if present:
        raise ValueError(f"the model carries {present}; apply_ the SelfSpeculationConfig beside that instead.")
    apply_(model, SelfSpeculationConfig() if config is None else config)
    try:
        return model.generate(inputs, **kwargs)
    finally:
        remove_(model)
