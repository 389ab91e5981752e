"""Early exit of encoder-decoders, decoders and encoders: a sample leaves the encoder, a token the decoder, where it is
settled.

MuE (arXiv 2211.11152): a state exits where the cosine with the state one layer below exceeds a threshold. Other
criteria and CALM's threshold for generated tokens, strict at first, are those of `mmskip.exits`. In training all layers
run.

    mmskip.apply_(model, mmskip.EarlyExitConfig(encoder=0.95, decoder=0.99))
    model.generate(**inputs)
    exit_layers(model)   # layers that ran, per sample and per token of the latest forward
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.config import MethodConfig, check_choice
from mmskip.exits.criteria import (
    CRITERIA,
    HEAD_CRITERIA,
    LEARNED,
    SAMPLE_CRITERIA,
    SampleScores,
    TokenScores,
    check_threshold,
    decayed,
    is_single,
    never_fires,
)
from mmskip.exits.heads import ExitHead
from mmskip.exits.report import exit_report
from mmskip.families.encoder import EncoderView
from mmskip.families.encoder_decoder import EncoderDecoderView
from mmskip.hf.exits.block import POLICIES, Decide, ExitRule
from mmskip.hf.exits.modalities import MODALITIES, telling
from mmskip.registry import register
from mmskip.reporting import register_report
from mmskip.swap import Change, states

COMPACT = ("auto", "never", "always")


@dataclass(frozen=True)
class EarlyExitConfig(MethodConfig):
    """Early exit of an encoder-decoder, a causal decoder, or an encoder alone or two of them.

    Attributes:
        decoder: threshold of a token's score, in the range of `criterion` (see `mmskip.exits`); the range's upper end
            never fires (unless it decays); None: the decoder is left as it is. With `depth` leave it out: its default
            gives way to that.
        encoder: the same for a sample in the encoder.
        image, text: the same for its image tokens and its text tokens, which then run the encoder apart, with the same
            weights (MuE); both or none, instead of `encoder`. A model that puts image features among its tokens says
            where they are; else `image_tokens` does.
        depth, encoder_depth: instead of a threshold: every state leaves behind so many layers, >= 1. Nothing is decided
            while the model runs, which then compiles as a whole.
        once: whether a sample's first decoder token decides, behind the first point, for all of its tokens: they leave
            there, or run on. Of encoder-decoders, as `decay`: those of a decoder alone begin with the prompt.
        criterion: of the decoder: `saturation`, `state_norm`, `confidence`, `margin`, `entropy`, `patience` or
            `learned`: new weights behind each exit point, see `exit_heads`.
        encoder_criterion: of the encoder: `saturation`, `state_norm` or `learned`.
        kv: keys and values of an exited token in the layers above: `project`, `copy` or `hole`.
        min_layers, encoder_min_layers: layers that always run, at least 1.
        max_layers, encoder_max_layers: layers that run at most, whatever the scores; None: all.
        points, encoder_points: numbers of the layers (from 1) behind which an exit is possible; None: every one.
        decay: share beta, in (0, 1], of the constant part of the decoder's threshold (CALM); None: it is constant.
        decay_speed: tau, > 0.
        decay_steps: tokens generated at most, the unit of the decay.
        compact: whether a layer that only some rows of a batch still need runs on those rows alone: `always`, `never`,
            or `auto`: where that pays by `Compaction`.
        compact_overhead: what taking rows out and putting them back costs, as a share of the layer's time for all rows,
            in [0, 1].
    """

    decoder: float | None = 0.99
    encoder: float | None = None
    criterion: str = "saturation"
    encoder_criterion: str = "saturation"
    kv: str = "project"
    min_layers: int = 1
    encoder_min_layers: int = 1
    points: tuple[int, ...] | None = None
    encoder_points: tuple[int, ...] | None = None
    decay: float | None = None
    decay_speed: float = 1.0
    decay_steps: int = 16
    compact: str = "auto"
    compact_overhead: float = 0.25
    image: float | None = None
    text: float | None = None
    depth: int | None = None
    encoder_depth: int | None = None
    once: bool = False
    max_layers: int | None = None
    encoder_max_layers: int | None = None

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("encoder_criterion", self.encoder_criterion, SAMPLE_CRITERIA)
        check_choice("kv", self.kv, POLICIES)
        check_choice("compact", self.compact, COMPACT)
        if not _is_number(self.compact_overhead) or not 0 <= self.compact_overhead <= 1:
            raise ValueError(f"compact_overhead is {self.compact_overhead!r}; expected a number in [0, 1].")
        self._check_exits()
        for name in ("min_layers", "encoder_min_layers"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected an integer >= 1.")
        self._check_most()
        for name in ("points", "encoder_points"):
            given = getattr(self, name)
            if given is not None and not (given and all(map(_is_count, given)) and len(set(given)) == len(given)):
                raise ValueError(f"{name} is {given!r}; expected different layer numbers >= 1, or None.")
            object.__setattr__(self, name, None if given is None else tuple(sorted(given)))
        self._check_decay()

    @classmethod
    def grid(cls, **settings: Any) -> list["EarlyExitConfig"]:
        """One config per combination of the values given, a list or a single value per field; for `mmskip.calibrate`
        with `scout`.

        Raises:
            ValueError: an unknown field, or a value out of range.
        """
        names = list(settings)
        values = [value if isinstance(value, list) else [value] for value in settings.values()]
        return [cls.from_dict(dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*values)]

    def _check_exits(self) -> None:
        if self.depth is not None and self.decoder == type(self).decoder:
            object.__setattr__(self, "decoder", None)
        ways = ("decoder", "encoder", "image", "depth", "encoder_depth")
        if all(getattr(self, name) is None for name in ways):
            raise ValueError("decoder and encoder are both None; give a threshold for at least one of them.")
        if (self.image is None) != (self.text is None):
            raise ValueError(f"image is {self.image!r} and text {self.text!r}; expected both or none.")
        for first, second in (("decoder", "depth"), ("encoder", "encoder_depth"), ("encoder", "image"),
                              ("encoder_depth", "image")):  # fmt: skip
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise ValueError(
                    f"{first} is {getattr(self, first)!r} and {second} {getattr(self, second)!r}; choose one of them."
                )
        for name in ("decoder", "encoder", "image", "text"):
            if getattr(self, name) is not None:
                criterion = self.criterion if name == "decoder" else self.encoder_criterion
                check_threshold(name, criterion, getattr(self, name))
        for name in ("depth", "encoder_depth"):
            if getattr(self, name) is not None and not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected an integer >= 1, or None.")
        if self.once and (self.decoder is None or self.decay is not None):
            raise ValueError("once is True, which needs a threshold of the decoder that does not decay.")

    def _check_most(self) -> None:
        for part, thresholds in (("", ("decoder",)), ("encoder_", ("encoder", "image"))):
            most, least = getattr(self, f"{part}max_layers"), getattr(self, f"{part}min_layers")
            if most is None:
                continue
            if not _is_count(most) or most < least:
                raise ValueError(
                    f"{part}max_layers is {most!r}; expected an integer >= {part}min_layers ({least}), or None."
                )
            if getattr(self, f"{part}depth") is not None:
                depth = getattr(self, f"{part}depth")
                raise ValueError(f"{part}max_layers is {most} and {part}depth {depth}; choose one of them.")
            if all(getattr(self, name) is None for name in thresholds):
                raise ValueError(
                    f"{part}max_layers is {most}, and nothing is decided below it: give a threshold, or use "
                    f"{part}depth={most} instead."
                )

    def _check_decay(self) -> None:
        if self.decay is not None and self.criterion in ("patience", "state_norm"):
            raise ValueError(f"decay is for thresholds in [0, 1]; criterion is {self.criterion!r}.")
        for name, high in (("decay", 1.0), ("decay_speed", float("inf"))):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= high):
                raise ValueError(f"{name} is {value!r}; expected a number in (0, {high:g}].")
        if not _is_count(self.decay_steps):
            raise ValueError(f"decay_steps is {self.decay_steps!r}; expected an integer >= 1.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Compaction:
    """When rows that have exited are taken out of a layer. The layer's time is taken to grow with its rows, and the
    taking out and putting back to cost `overhead` of the layer's time for all rows: it pays where left / rows +
    overhead < 1."""

    mode: str
    overhead: float

    def __call__(self, left: int, rows: int) -> bool:
        """Whether a layer runs on the `left` of `rows` rows that need it."""
        return self.mode == "always" or (self.mode == "auto" and left / rows + self.overhead < 1)


@dataclass(frozen=True)
class TokenRule:
    """When a token leaves the decoder."""

    config: EarlyExitConfig
    points: tuple[int, ...]
    head: Callable[[Tensor], Tensor] | None
    compacts: Compaction
    leaves: str = "decoder"
    heads: tuple[ExitHead, ...] = ()
    last: int | None = None

    @property
    def policy(self) -> str | None:
        """What becomes of an exited token's keys and values."""
        return self.config.kv

    @property
    def remembers(self) -> bool:
        """Whether decisions about the first token hold for its row."""
        return self.config.once and bool(self.points)

    def begin(self, mask_BT: Tensor | None, past: int, memory: Any) -> Decide:
        """Decisions [B, T] of one forward."""
        scores, config = TokenScores(self.config.criterion, self.head, self.heads), self.config
        assert config.decoder is not None
        threshold = config.decoder

        def decide(after_BTD: Tensor, before_BTD: Tensor) -> Tensor | bool:
            batch, count = after_BTD.shape[:2]
            one = is_single(after_BTD, batch * count)
            score: Any = (scores.single if one else scores)(after_BTD, before_BTD)
            if config.criterion == "patience":
                return score >= threshold
            if config.decay is None:
                return score > threshold
            position_T = torch.arange(past, past + count, device=after_BTD.device)
            limit_T = decayed(threshold, config.decay, config.decay_speed, config.decay_steps, position_T)
            return score > (limit_T.item() if one else limit_T)

        return partial(_decide_once, decide, memory) if config.once else decide


def _decide_once(decide: Decide, memory: Any, after_BTD: Tensor, before_BTD: Tensor) -> Tensor | bool:
    """Decisions [B, T] that the first token of each row makes; `memory` holds them for later calls."""
    known, leaves_B = (None, None) if memory is None else (memory.all_leave, memory.leaves)
    if leaves_B is None:
        first = decide(after_BTD[:, :1], before_BTD[:, :1])
        leaves_B = torch.as_tensor(first, device=after_BTD.device).view(-1)
        known = bool(leaves_B.all()) if bool((leaves_B == leaves_B[0]).all()) else None
        if memory is not None:
            memory.leaves, memory.all_leave = leaves_B, known
    return leaves_B[:, None].expand(after_BTD.shape[:2]) if known is None else known


@dataclass(frozen=True)
class SampleRule:
    """When a sample, or one modality of it, leaves the encoder."""

    criterion: str
    threshold: float
    points: tuple[int, ...]
    compacts: Compaction
    leaves: str = "encoder"
    heads: tuple[ExitHead, ...] = ()
    last: int | None = None
    policy: str | None = None
    remembers: bool = False

    def begin(self, mask_BT: Tensor | None, past: int, memory: Any) -> Decide:
        """Decisions [B] of one forward."""
        scores = SampleScores(self.criterion, mask_BT, self.heads)

        def decide(after_BTD: Tensor, before_BTD: Tensor) -> Tensor | bool:
            one = is_single(after_BTD, len(after_BTD))
            score: Any = (scores.single if one else scores)(after_BTD, before_BTD)
            return score > self.threshold

        return decide


@dataclass(frozen=True)
class DepthRule:
    """Every state leaves behind the same layer."""

    last: int
    leaves: str
    points: tuple[int, ...] = ()
    policy: str | None = None
    remembers: bool = False

    def begin(self, mask_BT: Tensor | None, past: int, memory: Any) -> Decide:
        """Never asked."""
        return lambda after_BTD, before_BTD: False

    def compacts(self, left: int, rows: int) -> bool:
        """Rows never differ."""
        return False


def _points(config: EarlyExitConfig, part: str, depth: int) -> tuple[int, ...]:
    """The exit points of a stack, of whose settings `part` is the prefix.

    Raises:
        ValueError: one of them does not exist, or none is left.
    """
    given, least, most = (getattr(config, part + name) for name in ("points", "min_layers", "max_layers"))
    wrong = [point for point in given or () if point > depth]
    if wrong:
        raise ValueError(
            f"{part}points has {wrong[0]}, and there are {depth} layers; expected numbers from 1 to {depth}."
        )
    if most is not None and most >= depth:
        raise ValueError(f"{part}max_layers is {most}, and there are {depth} layers; expected a number below that.")
    found = tuple(p for p in (range(1, depth) if given is None else given) if least <= p < (most or depth))
    if not found and (most is None or given is not None):
        named = f" and {part}points {given}" if given is not None else ""
        raise ValueError(
            f"{part}min_layers is {least}{named}, which leaves no exit: expected points from {part}min_layers to "
            f"{(most or depth) - 1} of {depth} layers."
        )
    return found


@register(EarlyExitConfig, "encoder_decoder")
def _changes(config: EarlyExitConfig, view: EncoderDecoderView) -> list[Change]:
    changes: list[Change] = []
    blocks = view.encoder
    if config.encoder is not None:
        rule, heads = _sample_rule(config, "encoder", blocks)
        changes += _with_heads(view.exit_changes("encoder", rule), heads)
    elif config.image is not None:
        found = {name: _sample_rule(config, name, blocks) for name in MODALITIES}
        changes += view.split_changes({name: rule for name, (rule, _) in found.items()})
        for name, (_, heads) in found.items():
            changes = _with_heads(changes, heads, f"_{name}")
    elif config.encoder_depth is not None:
        depth = _depth("encoder_depth", config.encoder_depth, len(blocks))
        changes += view.exit_changes("encoder", DepthRule(depth, "encoder"))
    return changes + _leave_decoder(config, view.decoder, view.head, partial(view.exit_changes, "decoder"))


@register(EarlyExitConfig, "vlm", "decoder")
def _decoder_changes(config: EarlyExitConfig, view: Any) -> list[Change]:
    for name in ("encoder", "image", "encoder_depth"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}; {type(view.root).__name__} has a decoder only: set decoder or "
                "depth, and leave encoder, image, text and encoder_depth out."
            )
    if config.once or config.decay is not None:
        given = "once is True" if config.once else f"decay is {config.decay!r}"
        raise ValueError(
            f"{given}; the first tokens of {type(view.root).__name__} are those of the prompt, padding included, and "
            "not the first generated ones: once and decay serve encoder-decoders only, leave them out."
        )
    return _leave_decoder(config, view.blocks, view.head, view.exit_changes)


@register(EarlyExitConfig, "encoder")
def _encoder_changes(config: EarlyExitConfig, view: EncoderView) -> list[Change]:
    name = type(view.root).__name__
    if config.decoder is not None or config.depth is not None:
        raise ValueError(f"{name} has no decoder; set decoder=None, and encoder (or encoder_depth) instead.")
    if config.image is not None and "image" not in view.stacks:
        raise ValueError(f"image is {config.image!r}; {name} has one encoder, not two towers: use encoder instead.")
    changes: list[Change] = []
    for stack, blocks in view.stacks.items():
        if config.encoder_depth is not None:
            rule: ExitRule = DepthRule(_depth("encoder_depth", config.encoder_depth, len(blocks)), stack)
            changes += view.exit_changes(stack, rule)
        else:
            rule, heads = _sample_rule(config, stack, blocks)
            changes += _with_heads(view.exit_changes(stack, rule), heads)
    return changes


def _sample_rule(config: EarlyExitConfig, name: str, blocks: Sequence[nn.Module]) -> tuple[SampleRule, dict[int, Any]]:
    """The rule by which samples leave a stack, and the new head of each exit point."""
    points = _points(config, "encoder_", len(blocks))
    threshold = config.encoder if config.encoder is not None else getattr(config, name)
    heads = _new_heads(points, blocks) if config.encoder_criterion == LEARNED else {}
    compacts = Compaction(config.compact, config.compact_overhead)
    points = _scored(points, config.encoder_criterion, threshold)
    found = tuple(heads.values())
    return SampleRule(
        config.encoder_criterion, threshold, points, compacts, name, found, config.encoder_max_layers
    ), heads


def _leave_decoder(config: EarlyExitConfig, blocks: Sequence[nn.Module], head: Any, changes: Any) -> list[Change]:
    """The changes of a decoder; `head` makes its exit head, `changes` turns a rule into them."""
    if config.decoder is not None:
        points = _points(config, "", len(blocks))
        points = points[:1] if config.once else points
        made = head() if config.criterion in HEAD_CRITERIA else None
        heads = _new_heads(points, blocks) if config.criterion == LEARNED else {}
        compacts = Compaction(config.compact, config.compact_overhead)
        points = points if config.decay is not None else _scored(points, config.criterion, config.decoder)
        rule = TokenRule(config, points, made, compacts, heads=tuple(heads.values()), last=config.max_layers)
        return _with_heads(changes(rule), heads)
    if config.depth is not None:
        fixed = DepthRule(_depth("depth", config.depth, len(blocks)), "decoder", policy=config.kv)
        found: list[Change] = changes(fixed)
        return found
    return []


def _scored(points: tuple[int, ...], criterion: str, threshold: float) -> tuple[int, ...]:
    """Points whose score may be above the threshold; heads to be fitted keep theirs."""
    return () if never_fires(criterion, threshold) and criterion != LEARNED else points


def _new_heads(points: tuple[int, ...], blocks: Sequence[nn.Module]) -> dict[int, ExitHead]:
    """A head with one output behind each exit point."""
    found = {}
    for point in points:
        norms = [m.weight for m in blocks[point - 1].modules() if "norm" in type(m).__name__.lower()]
        widths = [weight.numel() for weight in norms if isinstance(weight, Tensor)]
        if not widths:
            raise ValueError(
                f"{type(blocks[point - 1]).__name__} has no norm with weights, by which the width of a learned head is "
                "told; choose another criterion."
            )
        found[point] = ExitHead(max(widths), 1).to(next(blocks[point - 1].parameters()).device)
    return found


def _with_heads(changes: list[Change], heads: dict[int, ExitHead], suffix: str = "") -> list[Change]:
    """The changes of a stack's blocks, with the heads as new children."""
    added = {index: {f"mmskip_exit{suffix}": heads[index + 1]} for index in range(len(changes)) if index + 1 in heads}
    return [replace(c, children={**c.children, **added.get(index, {})}) for index, c in enumerate(changes)]


def exit_heads(model: nn.Module) -> dict[str, dict[int, ExitHead]]:
    """The new heads of the criterion `learned`, by what leaves and by the number of layers that have run.

    `score` of the states [B, T, D] there (of an encoder: of their mean over a sample's tokens, [B, 1, D]) is the
    probability that stopping is right. All layers run in training; fit the heads to whatever "right" means, for
    instance that the model's own head says the same there as at its end.
    """
    rules = [rule for state in states(model) for rule in _rules(state)]
    return {rule.leaves: dict(zip(rule.points, rule.heads, strict=True)) for rule in rules if rule.heads}


def _rules(state: Any) -> list[Any]:
    found = [getattr(state, "rule", None), *getattr(state, "rules", {}).values()]
    return [rule for rule in found if isinstance(rule, TokenRule | SampleRule)]


def _depth(name: str, given: int, layers: int) -> int:
    if given >= layers:
        raise ValueError(f"{name} is {given}, and there are {layers} layers; expected a number below that.")
    return given


@contextmanager
def image_tokens(model: nn.Module, mask_BT: Tensor) -> Iterator[None]:
    """Encodings of `model` inside have image tokens where `mask_BT`, boolean [B, T], is True: for models that do not
    say so themselves, and for calls of an encoder alone.

    Raises:
        ValueError: no EarlyExitConfig with `image` and `text` is applied to `model`.
    """
    modalities = next((state.modalities for state in states(model) if hasattr(state, "modalities")), None)
    if modalities is None:
        raise ValueError("nothing runs the modalities apart: apply an EarlyExitConfig(image=..., text=...) first.")
    with telling(modalities, mask_BT):
        yield


register_report(EarlyExitConfig)(exit_report)


def exit_layers(model: nn.Module) -> dict[str, Tensor]:
    """Layers that ran for each state in the latest forward: `encoder` [B] (or `image` and `text`, where these run
    apart), `decoder` [B, T].

    Raises:
        ValueError: the model has no early exit, did not run yet, or ran in training mode, where nothing exits.
    """
    found = {}
    for state in states(model):
        for name, run in getattr(state, "told", {}).items():
            if run.exits is not None:
                found[name] = run.exits
    if not found:
        raise ValueError("no exits to tell: apply an EarlyExitConfig and run the model in evaluation mode first.")
    return found
