"""Early exit: a sample exits an encoder, a token exits a decoder, after the first layer where its output is settled.

MuE (arXiv 2211.11152): a state exits where the cosine with the state one layer below exceeds a threshold. Further
criteria, and CALM's threshold that is strict for the first generated tokens, are in `mmskip.exits`. In training all
layers run.

    mmskip.apply_(model, mmskip.EarlyExitConfig(encoder=0.95, decoder=0.99))
    model.generate(**inputs)
    mmskip.report(model)["EarlyExitConfig"].layers  # layers run, per sample and per token of the latest forward
"""

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mmskip.cache_policy import ALIASES
from mmskip.config import MethodConfig, check_choice, check_number, renamed
from mmskip.exits.criteria import HEAD_CRITERIA, LEARNED, SAMPLE_CRITERIA, never_fires
from mmskip.exits.flat_settings import DEFAULT, FLAT, nested
from mmskip.exits.heads import ExitHead, new_heads
from mmskip.exits.report import exit_report
from mmskip.exits.rules import (
    COMPACT,
    MODALITIES,
    Compaction,
    Decay,
    ExitRule,
    FixedRule,
    SampleRule,
    TokenRule,
)
from mmskip.exits.settings import ExitAt, FixedExit, parse_exit, short_repr
from mmskip.registry import register
from mmskip.reporting import register_report
from mmskip.swap import Change, states

CACHE_POLICIES = ("recompute", "copy", "mask")
_DECODER = ExitAt(DEFAULT)
_STACKS = ("decoder", "encoder", "image", "text")


@renamed(values={"cache_policy": ALIASES}, convert=nested, old=FLAT)
@dataclass(frozen=True, repr=False)
class EarlyExitConfig(MethodConfig):
    """Early exit of an encoder-decoder, of a causal decoder, or of one encoder or two.

    >>> import mmskip
    >>> from mmskip.exits import ExitAt, FixedExit
    >>> config = mmskip.EarlyExitConfig(decoder=ExitAt(0.9, criterion="entropy", exit_layers=(2, 4)), encoder=0.95)
    >>> config.encoder == ExitAt(0.95)  # a number is the threshold of a saturation
    True
    >>> mmskip.EarlyExitConfig(decoder=FixedExit(3), cache_policy="copy")
    EarlyExitConfig(decoder=FixedExit(layer=3), cache_policy='copy')

    Names of version 0.1 (`criterion`, `points`, `kv`, `depth`, `once`, ...) are read with a FutureWarning.

    Attributes:
        decoder: exits of tokens; None: every layer of the decoder runs.
        encoder: exits of samples; criteria `saturation`, `state_norm` or `learned`. Of two encoders it serves both.
        image, text: the same for image tokens and for text tokens, which then run the encoder apart, with the same
            weights (MuE); both or none, instead of `encoder`. A model that places image features among its tokens
            knows where they are; for others see `image_tokens`.
        cache_policy: keys and values of an exited token in later layers: `recompute` (the layer's own, of the state at
            the exit, computed when the layer next runs), `copy` (of the last layer that ran) or `mask` (none); see
            `mmskip.cache_policy`.
        compact: whether a layer that only some rows of a batch still need runs on those rows alone: `always`, `never`,
            or `auto`: where that pays, see `mmskip.exits.rules.Compaction`.
        compact_overhead: cost of removing and restoring rows, as a share of the layer's time for all rows, in [0, 1].
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("exit",)

    decoder: float | ExitAt | FixedExit | None = _DECODER
    encoder: float | ExitAt | FixedExit | None = None
    image: float | ExitAt | FixedExit | None = None
    text: float | ExitAt | FixedExit | None = None
    cache_policy: str = "recompute"
    compact: str = "auto"
    compact_overhead: float = 0.25

    def __post_init__(self) -> None:
        for name in _STACKS:
            object.__setattr__(self, name, parse_exit(name, getattr(self, name)))
        if all(getattr(self, name) is None for name in _STACKS):
            raise ValueError("decoder and encoder are both None; give a threshold for at least one of them.")
        if (self.image is None) != (self.text is None):
            raise ValueError(f"image is {self.image!r} and text {self.text!r}; expected both or none.")
        if self.encoder is not None and self.image is not None:
            raise ValueError(f"encoder is {self.encoder!r} and image {self.image!r}; choose one of them.")
        for name in ("encoder", "image", "text"):
            found = getattr(self, name)
            if isinstance(found, ExitAt):
                check_choice(f"{name}: criterion", found.criterion, SAMPLE_CRITERIA)
                for setting in ("decay", "decide_once"):
                    if getattr(found, setting):
                        raise ValueError(f"{name}: {setting} is {getattr(found, setting)!r}; it serves decoders only.")
        check_choice("cache_policy", self.cache_policy, CACHE_POLICIES)
        check_choice("compact", self.compact, COMPACT)
        check_number("compact_overhead", self.compact_overhead, 0, 1)

    def __repr__(self) -> str:
        return short_repr(self, always=("decoder",))

    @classmethod
    def grid(cls, **settings: Any) -> list["EarlyExitConfig"]:
        """Return one config per combination of the values given, a list or a single value per field; for
        `mmskip.calibrate` with `scout`.

        Raises:
            ValueError: an unknown field, or a value out of range.
        """
        names = list(settings)
        values = [value if isinstance(value, list) else [value] for value in settings.values()]
        return [cls.from_dict(dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*values)]


@register(EarlyExitConfig, "encoder_decoder")
def early_exit_encoder_decoder(config: EarlyExitConfig, view: Any) -> list[Change]:
    """Return the changes by which samples exit an encoder and tokens its decoder."""
    from mmskip.hf.exits.block import exit_changes
    from mmskip.hf.exits.modalities import split_changes

    changes, blocks = list[Change](), view.stacks["encoder"]
    if config.encoder is not None:
        rule = _sample_rule(config, config.encoder, "encoder", "encoder", blocks)
        changes += exit_changes(view, "encoder", rule, _heads_of({"": rule}))
    elif config.image is not None:
        rules = {name: _sample_rule(config, getattr(config, name), name, name, blocks) for name in MODALITIES}
        changes += split_changes(view, rules, _heads_of({f"_{name}": rule for name, rule in rules.items()}))
    return changes + _decoder_changes(config, view, "decoder")


@register(EarlyExitConfig, "vlm", "decoder")
def early_exit_decoder(config: EarlyExitConfig, view: Any) -> list[Change]:
    """Return the changes by which tokens exit a causal decoder."""
    for name in ("encoder", "image"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}; {type(view.root).__name__} has a decoder only: set decoder, and "
                "leave encoder, image and text out."
            )
    exit_ = config.decoder
    if isinstance(exit_, ExitAt) and (exit_.decide_once or exit_.decay is not None):
        given = "decide_once is True" if exit_.decide_once else f"decay is {exit_.decay!r}"
        raise ValueError(
            f"decoder: {given}; the first tokens of {type(view.root).__name__} are those of the prompt, padding "
            "included, and not the first generated ones: decide_once and decay serve encoder-decoders only, leave them "
            "out."
        )
    return _decoder_changes(config, view, "block")


@register(EarlyExitConfig, "encoder")
def early_exit_encoder(config: EarlyExitConfig, view: Any) -> list[Change]:
    """Return the changes by which samples exit one encoder or two."""
    from mmskip.hf.exits.block import exit_changes

    name = type(view.root).__name__
    if config.decoder is not None:
        raise ValueError(f"{name} has no decoder; set decoder=None, and encoder instead.")
    if config.image is not None and "image" not in view.stacks:
        raise ValueError(f"image is {config.image!r}; {name} has one encoder, not two towers: use encoder instead.")
    changes = list[Change]()
    for stack, blocks in view.stacks.items():
        exit_, part = (config.encoder, "encoder") if config.image is None else (getattr(config, stack), stack)
        rule = _sample_rule(config, exit_, part, stack, blocks)
        changes += exit_changes(view, stack, rule, _heads_of({"": rule}))
    return changes


def _decoder_changes(config: EarlyExitConfig, view: Any, stack: str) -> list[Change]:
    """Return the changes by which tokens exit a stack of decoder blocks."""
    from mmskip.hf.exits.block import exit_changes
    from mmskip.hf.exits.heads import exit_head

    exit_, blocks = config.decoder, view.stacks[stack]
    if exit_ is None:
        return []
    if isinstance(exit_, FixedExit):
        layer = _fixed_layer("decoder", exit_, len(blocks))
        return exit_changes(view, stack, FixedRule(layer, "decoder", config.cache_policy))
    assert isinstance(exit_, ExitAt)
    layers = _exit_layers("decoder", exit_, len(blocks))
    layers = layers[:1] if exit_.decide_once else layers
    scored = layers if exit_.decay is not None else _scored(layers, exit_)
    rule = TokenRule(
        exit_.criterion,
        exit_.threshold,
        scored,
        config.cache_policy,
        Compaction(config.compact, config.compact_overhead),
        head=exit_head(view) if exit_.criterion in HEAD_CRITERIA else None,
        heads=new_heads(layers, blocks) if exit_.criterion == LEARNED else (),
        last_layer=exit_.max_layers,
        decay=None if exit_.decay is None else Decay(exit_.decay, exit_.decay_speed, exit_.decay_steps),
        decides_once=exit_.decide_once and bool(scored),
    )
    return exit_changes(view, stack, rule, _heads_of({"": rule}))


def _sample_rule(
    config: EarlyExitConfig, exit_: float | ExitAt | FixedExit | None, part: str, name: str, blocks: Sequence[nn.Module]
) -> ExitRule:
    """Return the rule by which samples exit a stack.

    Args:
        part: the setting that `exit_` is, for errors.
        name: of the stack.
    """
    if isinstance(exit_, FixedExit):
        return FixedRule(_fixed_layer(part, exit_, len(blocks)), name)
    assert isinstance(exit_, ExitAt)
    layers = _exit_layers(part, exit_, len(blocks))
    return SampleRule(
        exit_.criterion,
        exit_.threshold,
        _scored(layers, exit_),
        Compaction(config.compact, config.compact_overhead),
        heads=new_heads(layers, blocks) if exit_.criterion == LEARNED else (),
        last_layer=exit_.max_layers,
        name=name,
    )


def _exit_layers(part: str, exit_: ExitAt, depth: int) -> tuple[int, ...]:
    """Return the layers of a stack after which an exit is decided.

    Raises:
        ValueError: one of them does not exist, or none remains.
    """
    given, least, most = exit_.exit_layers, exit_.min_layers, exit_.max_layers
    wrong = [layer for layer in given or () if layer > depth]
    if wrong:
        raise ValueError(
            f"{part}: exit_layers has {wrong[0]}, and there are {depth} layers; expected numbers from 1 to {depth}."
        )
    if most is not None and most >= depth:
        raise ValueError(f"{part}: max_layers is {most}, and there are {depth} layers; expected a number below that.")
    found = tuple(n for n in (range(1, depth) if given is None else given) if least <= n < (most or depth))
    if not found and (most is None or given is not None):
        named = f" and exit_layers {given}" if given is not None else ""
        raise ValueError(
            f"{part}: min_layers is {least}{named}, which leaves no exit: expected exit_layers from min_layers to "
            f"{(most or depth) - 1} of {depth} layers."
        )
    return found


def _fixed_layer(part: str, exit_: FixedExit, depth: int) -> int:
    if exit_.layer >= depth:
        raise ValueError(f"{part}: layer is {exit_.layer}, and there are {depth} layers; expected a number below that.")
    return exit_.layer


def _scored(layers: tuple[int, ...], exit_: ExitAt) -> tuple[int, ...]:
    """Return the layers whose score may exceed the threshold; learned heads, which are to be fitted, keep theirs."""
    return () if never_fires(exit_.criterion, exit_.threshold) and exit_.criterion != LEARNED else layers


def _heads_of(rules: Mapping[str, ExitRule]) -> dict[int, dict[str, nn.Module]]:
    """Return the learned heads of rules by block index and by the name of the new child; rules by suffix of that."""
    found: dict[int, dict[str, nn.Module]] = {}
    for suffix, rule in rules.items():
        for layer, head in zip(rule.exit_layers, getattr(rule, "heads", ()), strict=False):
            found.setdefault(layer - 1, {})[f"mmskip_exit{suffix}"] = head
    return found


def exit_heads(model: nn.Module) -> dict[str, dict[int, ExitHead]]:
    """Return the new heads of the criterion `learned`, by stack and by the number of layers that have run.

    `score` of the states [B, T, D] there (of an encoder: of their mean over a sample's tokens, [B, 1, D]) is the
    probability that stopping is right. All layers run in training; fit the heads to any definition of "right", for
    instance that the model's own head gives the same token there as at its end.
    """
    rules = [rule for state in states(model) for rule in _rules(state)]
    return {rule.name: dict(zip(rule.exit_layers, rule.heads, strict=True)) for rule in rules if rule.heads}


def _rules(state: Any) -> list[Any]:
    found = [getattr(state, "rule", None), *getattr(state, "rules", {}).values()]
    return [rule for rule in found if isinstance(rule, TokenRule | SampleRule)]


@contextmanager
def image_tokens(model: nn.Module, mask_BT: Tensor) -> Iterator[None]:
    """Within the context, the image tokens of every encoding of `model` are where `mask_BT`, boolean [B, T], is True:
    for models that do not place image features themselves, and for calls of an encoder alone.

    Raises:
        ValueError: no EarlyExitConfig with `image` and `text` is applied to `model`.
    """
    from mmskip.hf.exits.modalities import image_mask

    with image_mask(model, mask_BT):
        yield


register_report(EarlyExitConfig)(exit_report)


def exit_layers(model: nn.Module) -> dict[str, Tensor]:
    """Return the layers that ran for each state in the latest forward, by stack. Deprecated: use `mmskip.report`.

    Raises:
        ValueError: the model has no early exit, did not run yet, or ran in training mode, where nothing exits.
    """
    from mmskip.exits.runs import layers_run

    warnings.warn(
        "exit_layers(model) is deprecated; use mmskip.report(model)['EarlyExitConfig'].layers.",
        FutureWarning,
        stacklevel=2,
    )
    found = {name: layers for name, layers in layers_run(model).items() if layers is not None}
    if not found:
        raise ValueError("no exits to report: apply an EarlyExitConfig and run the model in evaluation mode first.")
    return found
