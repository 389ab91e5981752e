"""Layer plans: drop, repeat or reorder blocks of a pretrained decoder, or run them without attention or MLP.

Unified Layer Skipping (arXiv 2404.06954) keeps evenly spaced blocks while decoding; LLM-Drop (arXiv 2406.15786) drops
the blocks, attentions or MLPs that change their input least; CoLa (arXiv 2507.07996) runs any path of blocks.
"""

import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from mmskip import families
from mmskip.cache_policy import ALIASES
from mmskip.composition import Applied
from mmskip.config import MethodConfig, check_choice, check_count, check_indices, check_number, renamed
from mmskip.importance_table import ImportanceTable, fingerprint
from mmskip.plan import PHASES, DepthPlan, Visit
from mmskip.protocols import CountedView
from mmskip.registry import applied, register
from mmskip.reporting import MethodReport, register_report
from mmskip.swap import Change
from mmskip.utils.deprecated import renamed_arguments, warn_deprecated

CACHE_POLICIES = ("skip", "recompute")
RULES = (None, "unified", "random")
MODES = ("released", "balanced")
KINDS = ("block", "attn", "mlp", "joint")
CONTEXT = 256
"""Tokens attended to where the counted speed-up of decoding is given without a length."""
_OF_RULE = {"mode": ("unified", "released"), "count": ("random", 0), "seed": ("random", 0)}
"""Fields that only one rule reads: (rule, default)."""
_OLD_POLICIES = {old: new for old, new in ALIASES.items() if new in CACHE_POLICIES}
_log = logging.getLogger(__name__)


@renamed({"kv": "cache_policy", "made_for": "model_fingerprint"}, values={"cache_policy": _OLD_POLICIES})
@dataclass(frozen=True)
class LayerPlanConfig(MethodConfig):
    """A static plan of which blocks run, and in which order.

    The default is the identity. `LayerPlanConfig.unified`, `.random`, `.llm_drop`, `.cola`, `.lac` and
    `mmskip.calibration.greedy_drops` make the plans of the literature.

    Args:
        drop: indices of blocks that are left out.
        drop_attn, drop_mlp: indices of blocks that run without their attention, or without their MLP.
        order: block indices in the order of their visits, which may repeat: `(0, 1, 2, 1, 2, 3)`; other blocks are left
            out. None: every block once.
        cache_policy: what is left out stores in the KV cache (see `mmskip.cache_policy`): `"skip"`: nothing;
            `"recompute"`: keys and values of every token, so that all cache entries have one length and the phases may
            differ from turn to turn.
        phase: where the plan holds: `"both"`, `"prefill"` (the prompt) or `"decode"` (tokens after it); in the other
            phase the model runs unchanged. Inside `generate` the prompt is what it was given; elsewhere a call of one
            token onto a filled cache decodes (see `mmskip.hf.plans.block.decode_from`). With `"decode"` and `"skip"` a
            cache serves one prompt: a second prompt on it is refused.
        layers: number of blocks the indices were made for; None: not checked.
        model_fingerprint: the architecture they were made for, see `mmskip.importance_table.fingerprint`; None: not
            checked.
        rule: `"unified"` or `"random"`: the blocks are chosen when the model is known; the fields below belong to it.
        speedup: of `"unified"`, > 1.
        mode: of `"unified"`: `"released"`, the rule of the released code, or `"balanced"`, the number of evenly spaced
            blocks whose counted decoding speed-up, output head included, is nearest to `speedup`.
        count: of `"random"`: blocks to be left out, >= 0. The first block always stays.
        seed: of `"random"`, >= 0.

    Example:
        >>> plan = LayerPlanConfig(drop=(5, 3), drop_mlp=(7,), cache_policy="recompute")
        >>> plan.drop
        (3, 5)
        >>> LayerPlanConfig.from_dict(plan.to_dict()) == plan
        True
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("order", "parts")

    VERSION: ClassVar[int] = 2

    drop: Sequence[int] = ()
    drop_attn: Sequence[int] = ()
    drop_mlp: Sequence[int] = ()
    order: Sequence[int] | None = None
    cache_policy: str = "skip"
    phase: str = "both"
    layers: int | None = None
    model_fingerprint: str | None = None
    rule: str | None = None
    speedup: float | None = None
    mode: str = "released"
    count: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drop", "drop_attn", "drop_mlp", "order"):
            if getattr(self, name) is not None:
                indices = check_indices(name, getattr(self, name), repeats=name == "order", empty=name != "order")
                object.__setattr__(self, name, indices)
        choices = {"cache_policy": CACHE_POLICIES, "phase": PHASES, "rule": RULES, "mode": MODES}
        for name, values in choices.items():
            check_choice(name, getattr(self, name), values)
        if self.layers is not None:
            check_count("layers", self.layers)
        check_count("count", self.count)
        check_count("seed", self.seed)
        both = set(self.order or ()) & set(self.drop)
        if both:
            raise ValueError(f"order holds {sorted(both)}, which drop leaves out; name them in one.")
        self._check_rule()

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Drop what version 1 allowed and ignored: fields that only another rule reads."""
        rule = values.get("rule")
        return {name: value for name, value in values.items() if name not in _OF_RULE or _OF_RULE[name][0] == rule}

    def _check_rule(self) -> None:
        """Raise ValueError for a field of another rule than the one chosen."""
        if (self.rule == "unified") != (self.speedup is not None):
            raise ValueError(f"speedup is {self.speedup!r} with rule={self.rule!r}; they go together.")
        check_number("speedup", self.speedup, 1, open_low=True, optional=True)
        if self.rule is not None and (self.drop or self.order is not None):
            raise ValueError(f"rule={self.rule!r} chooses the blocks; leave drop and order out.")
        for name, (rule, default) in _OF_RULE.items():
            if self.rule != rule and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which only rule={rule!r} reads; rule is {self.rule!r}. Leave "
                    f"{name} out, or choose that rule."
                )

    @classmethod
    @renamed_arguments(kv="cache_policy")
    def unified(cls, speedup: float, mode: str = "released", phase: str = "decode", cache_policy: str = "skip") -> Self:
        """Plan of Unified Layer Skipping: the prompt runs all blocks, decoding runs evenly spaced ones."""
        return cls(rule="unified", speedup=speedup, mode=mode, phase=phase, cache_policy=cache_policy)

    @classmethod
    @renamed_arguments(kv="cache_policy")
    def random(cls, n: int, seed: int = 0, phase: str = "both", cache_policy: str = "skip") -> Self:
        """Plan of the control: `n` blocks drawn at random are left out; the first one stays."""
        return cls(rule="random", count=n, seed=seed, phase=phase, cache_policy=cache_policy)

    @classmethod
    def cola(cls, path: Sequence[int], layers: int | None = None) -> Self:
        """Plan of a chain of layers: run the blocks of a path, in its order. A path chosen with the answer known is an
        oracle."""
        return cls(order=tuple(path), layers=layers)

    @classmethod
    @renamed_arguments(kv="cache_policy")
    def lac(cls, table: ImportanceTable, least: float = 0.5, cache_policy: str = "skip") -> Self:
        """Plan of LAC's static set (arXiv 2505.14467): decoding leaves out the blocks that were active for less than a
        share `least` of the tokens of a prompt. The first block stays.

        Args:
            table: of `mmskip.importance(model, [prompt])`.
            least: in [0, 1].

        Raises:
            ValueError: `least` out of range.
        """
        check_number("least", least, 0, 1)
        drop = tuple(
            i for i, share in enumerate(table.columns["activity"]) if i and share is not None and share < least
        )
        return cls(
            drop=drop,
            phase="decode",
            cache_policy=cache_policy,
            layers=table.layers,
            model_fingerprint=table.model,
        )

    @classmethod
    @renamed_arguments(kv="cache_policy")
    def llm_drop(
        cls, table: ImportanceTable, n: int, kind: str = "block", phase: str = "both", cache_policy: str = "skip"
    ) -> Self:
        """Plan of LLM-Drop: leave out the `n` blocks, attentions or MLPs whose output is most like their input.

        Args:
            table: of `mmskip.importance(model, data)`.
            n: how many; with `"joint"` attentions and MLPs are sorted together.
            kind: `"block"`, `"attn"`, `"mlp"` or `"joint"`.

        Raises:
            ValueError: n out of range.
        """
        check_choice("kind", kind, KINDS)
        check_count("n", n)
        columns = {"block": ("drop_block",), "joint": ("drop_attn", "drop_mlp")}.get(kind, (f"drop_{kind}",))
        scored = [
            (value, column.removeprefix("drop_"), index)
            for column in columns
            for index, value in enumerate(table.columns[column])
            if value is not None
        ]
        if (n >= len(scored) and kind == "block") or n > len(scored):
            raise ValueError(f"n is {n}; this table can leave out fewer than {len(scored)} of kind {kind!r}.")
        best = sorted(scored, key=lambda item: (-item[0], -item[2]))[:n]
        chosen = {part: tuple(sorted(i for _, p, i in best if p == part)) for part in ("block", "attn", "mlp")}
        return cls(
            drop=chosen["block"],
            drop_attn=chosen["attn"],
            drop_mlp=chosen["mlp"],
            phase=phase,
            cache_policy=cache_policy,
            layers=table.layers,
            model_fingerprint=table.model,
        )


def unified_released(layers: int, speedup: float) -> tuple[int, ...]:
    """Return the blocks that the released code of Unified Layer Skipping keeps.

    Raises:
        ValueError: fewer than two blocks would be left (the released rule divides by zero).
    """
    kept = int(layers / speedup)
    if kept < 2:
        raise ValueError(
            f"speedup {speedup} leaves {kept} of {layers} blocks; the released rule needs two, a speedup of at most "
            f"{layers / 2}."
        )
    interval = int(layers / (kept - 1))
    inner = [index for index in range(1, layers - 1) if index % interval == 0][: kept - 2]
    return tuple(sorted({0, layers - 1, *inner}))


def evenly(layers: int, kept: int) -> tuple[int, ...]:
    """Return `kept` evenly spaced block indices, the first and the last included."""
    return tuple(round(i * (layers - 1) / (kept - 1)) for i in range(kept))


def decode_flops(view: CountedView, visits: Sequence[Visit], fill: bool = False, keys: int = CONTEXT) -> float:
    """Count the FLOPs of decoding one token by a plan with `keys` keys, output head included."""
    meter = view.meter()
    total = meter.head_flops()
    for visit in visits:
        parts = [part for part in ("attn", "mlp") if not getattr(visit, part)]
        total += meter.block_flops(visit.block, "block", keys)
        total -= sum(meter.block_flops(visit.block, part, keys) for part in parts)
        total += meter.block_flops(visit.block, "fill", keys) if fill and not visit.attn else 0.0
    left_out = set(range(len(view.blocks))) - {visit.block for visit in visits}
    return total + (sum(meter.block_flops(i, "fill", keys) for i in left_out) if fill else 0.0)


def _full(view: CountedView) -> list[Visit]:
    return [Visit(index) for index in range(len(view.blocks))]


def _balanced(view: CountedView, speedup: float, fill: bool) -> tuple[int, ...]:
    dense, count = decode_flops(view, _full(view)), len(view.blocks)
    plans = [evenly(count, kept) for kept in range(2, count + 1)]
    gains = [dense / decode_flops(view, [Visit(i) for i in plan], fill) for plan in plans]
    if speedup > 1.05 * max(gains):
        _log.warning(
            "asked for a speed-up of %g; two of %d blocks, the fewest, reach %.3g of decoding",
            speedup,
            count,
            max(gains),
        )
    return plans[min(range(len(plans)), key=lambda i: abs(gains[i] - speedup))]


def resolve(config: LayerPlanConfig, view: CountedView) -> DepthPlan:
    """Turn a config into the plan of a model.

    Raises:
        ValueError: the config does not fit the model.
    """
    count, fill = len(view.blocks), config.cache_policy == "recompute"
    if config.layers not in (None, count):
        raise ValueError(f"the plan was made for {config.layers} blocks; this model has {count}.")
    if config.model_fingerprint not in (None, fingerprint(view)):
        raise ValueError(
            f"the plan was made from the importance of another model ({config.model_fingerprint}); this one is "
            f"{fingerprint(view)}. Run mmskip.importance on it."
        )
    named = {*config.drop, *config.drop_attn, *config.drop_mlp, *(config.order or ())}
    if named and max(named) >= count:
        raise ValueError(f"the plan names block {max(named)}; the model has {count} blocks, 0 to {count - 1}.")
    order: Sequence[int] = range(count) if config.order is None else config.order
    if config.rule == "unified":
        assert config.speedup is not None
        released = config.mode == "released"
        order = unified_released(count, config.speedup) if released else _balanced(view, config.speedup, fill)
    elif config.rule == "random":
        if config.count >= count:
            raise ValueError(f"count is {config.count}; a model of {count} blocks can leave out {count - 1} at most.")
        dropped = random.Random(config.seed).sample(range(1, count), config.count)
        order = [index for index in range(count) if index not in dropped]
    visits = tuple(
        Visit(index, index not in config.drop_attn, index not in config.drop_mlp)
        for index in order
        if index not in config.drop
    )
    if not any(visit.attn or visit.mlp for visit in visits):
        raise ValueError("the plan leaves nothing to run; keep at least one block.")
    return DepthPlan(visits, config.phase, fill)


@dataclass(frozen=True)
class PlanReport(MethodReport):
    """Report of a plan applied to a model.

    Attributes:
        order: indices of the blocks in the order of their visits.
        speedup: counted speed-up of decoding one token at `CONTEXT` tokens, output head included.
        asked: what a `unified` config asks for, or None.
        reachable: for `unified`, the counted speed-ups next below and above `asked` that evenly spaced blocks reach.
    """

    order: tuple[int, ...]
    speedup: float
    asked: float | None = None
    reachable: tuple[float, ...] = ()

    def __str__(self) -> str:
        text = f"runs blocks {list(self.order)}; counted speed-up of decoding {self.speedup:.3f}"
        if self.asked is None:
            return text
        near = " and ".join(f"{value:.3f}" for value in self.reachable)
        return f"{text}, asked for {self.asked}; nearest reachable with evenly spaced blocks: {near}"


def preview(model: nn.Module, config: LayerPlanConfig) -> PlanReport:
    """Say what `config` would run on `model`, before it is applied; `print` the result. Of an applied plan,
    `mmskip.report(model)` says the same.

    Raises:
        ValueError: the config does not fit the model.
    """
    return _report(config, families.find(model, ("decoder", "vlm")))


def report(model: nn.Module, config: LayerPlanConfig) -> PlanReport:
    """Deprecated: `preview`, or `mmskip.report(model)` once the plan is applied."""
    warn_deprecated("mmskip.methods.layer_plan.report", "preview there, or mmskip.report for an applied plan")
    return preview(model, config)


def _report(config: LayerPlanConfig, view: CountedView) -> PlanReport:
    plan = resolve(config, view)
    dense = decode_flops(view, _full(view))
    order = tuple(visit.block for visit in plan.visits)
    gain = 1.0 if plan.phase == "prefill" else dense / decode_flops(view, plan.visits, plan.fill)
    if config.speedup is None:
        return PlanReport(order, gain)
    count = len(view.blocks)
    gains = sorted(
        dense / decode_flops(view, [Visit(i) for i in evenly(count, kept)], plan.fill) for kept in range(2, count + 1)
    )
    below = [value for value in gains if value <= config.speedup][-1:]
    above = [value for value in gains if value > config.speedup][:1]
    return PlanReport(order, gain, config.speedup, tuple(below + above))


@register_report(LayerPlanConfig)
def plan_report(record: Applied, model: nn.Module) -> PlanReport:
    """Report on one LayerPlanConfig."""
    return _report(record.config, families.find(model, ("decoder", "vlm")))


@register(LayerPlanConfig, "decoder", "vlm")
def layer_plan_decoder(config: LayerPlanConfig, view: CountedView) -> list[Change]:
    """Build the changes by which a decoder runs by a plan."""
    from mmskip.hf.plans.block import plan_changes

    changes = plan_changes(view, resolve(config, view))
    if config.rule == "unified":
        _log.info("%s", _report(config, view))
    return changes


def export(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a model with a plan of entire blocks as a stock checkpoint, see `mmskip.hf.plans.export.export`."""
    from mmskip.hf.plans.export import export as write

    return write(model, folder, applied(model))
