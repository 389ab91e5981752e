"""Early exits of a trained captioner: sweeps of thresholds, layers run, and cost.

Shapes: B rows, T tokens.
"""

import argparse
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

import mmskip
from mmskip import EarlyExitConfig
from mmskip.cache_policy import ALIASES, canonical
from mmskip.costs import torch_flops
from mmskip.exits.criteria import HEAD_CRITERIA, STATE_CRITERIA
from mmskip.exits.runs import layers_run
from mmskip.exits.settings import ExitAt
from mmskip.methods.early_exit import CACHE_POLICIES
from mmskip.models.captioner.module import Captioner
from mmskip.utils.deprecated import renamed_names
from mmskip.utils.timing import interleaved_ratio, paired_models, sharing_copy

FULL = "full"
PARTS = ("image", "prompt", "decoder")
_STACKS = {"encoder": ("encoder", "image", "text"), "decoder": ("decoder",)}


@dataclass(frozen=True)
class ExitVariant:
    """One setting a checkpoint is evaluated in.

    Attributes:
        name: for folders and tables.
        config: exits; None: every layer runs.
        blank: whether the images are black.
    """

    name: str
    config: EarlyExitConfig | None = None
    blank: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Settings the results depend on."""
        return {"exits": None if self.config is None else self.config.to_dict(), "blank": self.blank}


def add_exit_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of a sweep."""
    parser.add_argument("--image", type=float, nargs="+", help="thresholds of images in the encoder (MuE: 0.9)")
    parser.add_argument("--text", type=float, nargs="+", help="thresholds of prompts in the encoder (MuE: 0.95)")
    parser.add_argument("--encoder", type=float, nargs="+", help="the same for both, instead")
    parser.add_argument("--decoder", type=float, nargs="+", help="thresholds of tokens in the decoder")
    parser.add_argument(
        "--criterion", default="saturation", choices=(*STATE_CRITERIA, *HEAD_CRITERIA), help="of the decoder"
    )  # without the learned one, whose heads no checkpoint holds
    parser.add_argument("--encoder_criterion", default="saturation", choices=STATE_CRITERIA, help="of the encoder")
    policies = (*CACHE_POLICIES, *(old for old, new in ALIASES.items() if new in CACHE_POLICIES))
    parser.add_argument("--kv", default="recompute", choices=policies, help="keys and values of exited tokens")
    parser.add_argument("--decay", type=float, help="CALM's share of the constant part of the decoder's threshold")
    parser.add_argument("--min_layers", type=int, default=1, help="layers that always run (default 1)")
    parser.add_argument("--max_layers", type=int, help="decoder layers that run at most, whatever the scores")
    parser.add_argument("--blank", action="store_true", help="also at full depth with the images blanked")
    parser.add_argument("--timed", type=int, default=8, help="images whose calls are timed; 0: none (default 8)")
    parser.add_argument("--pairs_timed", type=int, default=15, help="paired runs of them (default 15)")


def plan(options: argparse.Namespace) -> list[ExitVariant]:
    """Full depth, and every combination of the thresholds given.

    Raises:
        ValueError: a threshold out of range, or numbers below what measuring needs.
    """
    if options.timed < 0 or options.pairs_timed < 2:
        raise ValueError(f"--timed is {options.timed} and --pairs_timed {options.pairs_timed}; expected >= 0 and >= 2")
    if options.max_layers is not None and not options.decoder:
        raise ValueError(f"--max_layers is {options.max_layers}, which needs thresholds of the decoder: give --decoder")
    found = [ExitVariant(FULL)]
    names = ("image", "text", "encoder", "decoder")
    for values in product(*(getattr(options, name) or [None] for name in names)):
        given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        if not given:
            continue
        exits: dict[str, Any] = {"decoder": None} | {
            name: _exit_at(name, value, options) for name, value in given.items()
        }
        config = EarlyExitConfig(**exits, cache_policy=canonical(options.kv))
        found.append(ExitVariant(_name(given, options), config))
    if options.blank:
        found.append(ExitVariant("blanked", blank=True))
    return found


def _exit_at(name: str, threshold: float, options: argparse.Namespace) -> ExitAt:
    """The exits of one stack; an error names the flag of its threshold."""
    further: dict[str, Any] = {"criterion": options.encoder_criterion}
    if name == "decoder":
        further = {"criterion": options.criterion, "max_layers": options.max_layers, "decay": options.decay}
    try:
        return ExitAt(threshold, min_layers=options.min_layers, **further)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from error


def _name(given: Mapping[str, float], options: argparse.Namespace) -> str:
    """Return the folder of a setting: thresholds, and whatever differs from its default, so that no two settings share
    one. Names are those of version 0.1, whose interrupted sweeps go on."""
    old_policies = {"recompute": "project", "mask": "hole"}
    policy = canonical(options.kv)
    others = {
        "criterion": (options.criterion, "saturation"),
        "encoder_criterion": (options.encoder_criterion, "saturation"),
        "kv": (old_policies.get(policy, policy), "project"),
        "min_layers": (options.min_layers, 1),
        "encoder_min_layers": (options.min_layers, 1),
        "decay": (options.decay, None),
        "max_layers": (options.max_layers, None),
    }
    changed = {name: value for name, (value, default) in others.items() if value != default}
    return "_".join(f"{name}-{value}" for name, value in {**given, **changed}.items())


def current_settings(found: dict[str, Any]) -> dict[str, Any]:
    """Return stored settings of an evaluation with their exits as today's version writes them."""
    if not found.get("exits"):
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return {**found, "exits": EarlyExitConfig.from_dict(found["exits"]).to_dict()}


@contextmanager
def using(model: Captioner, config: EarlyExitConfig | None) -> Iterator[None]:
    """Apply the exits inside the block and remove them after it."""
    if config is not None:
        mmskip.apply_(model.llm, config)
    try:
        yield
    finally:
        if config is not None:
            mmskip.remove_(model.llm)


# --- layers run -----------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Layers that ran for every state of the calls inside `recording`.

    Attributes:
        encoder: [B] per call of the encoder, or two where a call runs image and text apart.
        encodings: calls of the encoder.
        decoder: [B, T] per call of the decoder.
    """

    encoder: list[Tensor] = field(default_factory=list)
    encodings: int = 0
    decoder: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forget."""
        self.encoder, self.encodings, self.decoder = [], 0, []


@contextmanager
def recording(model: Captioner) -> Iterator[Recorder]:
    """Record the layers that run, with and without exits."""
    record, view = Recorder(), model.view
    config = next((c for c in mmskip.applied(model.llm) if isinstance(c, EarlyExitConfig)), None)

    def keep(part: str, depth: int) -> Any:
        names = [name for name in _STACKS[part] if getattr(config, name, None) is not None]

        def hook(block: Any, arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            exits = layers_run(model.llm) if names else {}
            layers = [found.cpu().clone() for name in names if (found := exits.get(name)) is not None]
            shape = hidden.shape[:1] if part == "encoder" else hidden.shape[:2]
            record.encodings += part == "encoder"
            getattr(record, part).extend(layers or [torch.full(shape, depth)])

        return hook

    handles = [
        view.encoder[-1].register_forward_hook(keep("encoder", len(view.encoder))),
        view.decoder[-1].register_forward_hook(keep("decoder", len(view.decoder))),
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def encoder_exits(record: Recorder, image: Tensor) -> tuple[list[int], list[int]]:
    """Layers that ran for the image and for the prompt of every row (the same where both ran together).

    Args:
        record: of one `encode`.
        image: LongTensor [R], see `mmskip.datasets.captioning.module.Texts`.
    """
    if record.encodings == 1:  # one row per prompt, of both
        return record.encoder[0].tolist(), record.encoder[-1].tolist()
    images, prompts = record.encoder
    return images[image.cpu()].tolist(), prompts.tolist()


def depths(records: Iterable[Mapping[str, Any]], model: Captioner) -> dict[str, Any]:
    """Means and histograms of the layers that ran, split by right and wrong, and the share of layers left out.

    Args:
        records: each with "image", "prompt" (numbers), "decoder" (numbers, one per token) and "right".
        model: gives the depths.
    """
    view = model.view
    full = {"image": len(view.encoder), "prompt": len(view.encoder), "decoder": len(view.decoder)}
    kept = list(records)
    ran = {part: [n for one in kept for n in _numbers(one[part])] for part in PARTS}
    found: dict[str, Any] = {
        "depth": full,
        "mean": {part: statistics.fmean(values) if values else None for part, values in ran.items()},
        "histogram": {},
    }
    for part in PARTS:
        found["histogram"][part] = {}
        for name, wanted in (("right", True), ("wrong", False)):
            counted = Counter(n for one in kept if one["right"] is wanted for n in _numbers(one[part]))
            found["histogram"][part][name] = [counted[layer] for layer in range(1, full[part] + 1)]
    layers = sum(sum(values) for values in ran.values())
    all_layers = sum(full[part] * len(values) for part, values in ran.items())
    return found | {"layers_left_out": 1 - layers / all_layers if all_layers else 0.0}


def _numbers(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


# --- cost -----------------------------------------------------------------------------------------------------------


def exit_cost(
    model: Captioner,
    config: EarlyExitConfig | None,
    calls: Sequence[Callable[[Captioner], Any]],
    pairs: int,
    clock: Callable[[], float] = time.perf_counter,
    ready: Callable[[Any], None] = lambda llm: None,
) -> dict[str, float]:
    """Counted and measured cost of some calls with exits, as shares of the same calls at full depth.

    Args:
        model: in evaluation mode; call it without gradients.
        config: exits.
        calls: one per sample, run one by one: an exited token then costs nothing but its keys and values.
        pairs: paired, interleaved runs of all calls, at least 2.
        clock: see `mmskip.utils.timing.interleaved_ratio`.
        ready: called with the encoder-decoder once it has its exits.

    Returns:
        `counted` (FLOPs), `measured` (time; median ratio with its quartiles `low` and `high`), `seconds` per call.
    """
    if config is None:
        seconds = interleaved_ratio(lambda: _run(model, calls), lambda: _run(model, calls), 2, clock=clock).fn_s
        return {"counted": 1.0, "measured": 1.0, "low": 1.0, "high": 1.0, "seconds": seconds / len(calls)}
    full, exiting = model.llm, mmskip.apply_(sharing_copy(model.llm), config)
    ready(exiting)
    counted = []
    try:
        for llm in (full, exiting):
            model.llm = llm
            counted.append(_flops(lambda: _run(model, calls)))
    finally:
        model.llm = full
    ratio = paired_models(model, "llm", full, exiting, lambda: _run(model, calls), pairs, clock)
    return {
        "counted": counted[1] / counted[0],
        "measured": 1 / ratio.median,
        "low": 1 / ratio.q3,
        "high": 1 / ratio.q1,
        "seconds": ratio.fn_s / len(calls),
    }


def _run(model: Captioner, calls: Sequence[Callable[[Captioner], Any]]) -> None:
    for call in calls:
        call(model)


def _flops(run: Callable[[], None]) -> int:
    with torch_flops() as counter:
        run()
    return counter.get_total_flops()


def exits_table(totals: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """One line per variant: metrics, mean layers, layers left out, counted FLOPs and measured time."""
    width = max(map(len, totals))
    head = [*metrics, "image", "prompt", "decoder", "layers", "FLOPs", "time"]
    lines = [" " * width + "".join(f"{title:>10}" for title in head) + "  (quartiles)"]
    for name, values in totals.items():
        cells = [f"{values['metrics'][metric]:>10.4f}" for metric in metrics]
        mean = values["exits"]["mean"]
        cells += [f"{mean[part]:>10.2f}" if mean[part] is not None else f"{'-':>10}" for part in PARTS]
        cells.append(f"{1 - values['exits']['layers_left_out']:>10.3f}")
        cost = values.get("compute")
        if cost:
            cells += [f"{cost['counted']:>10.3f}", f"{cost['measured']:>10.3f}"]
            cells.append(f"  {cost['low']:.3f} to {cost['high']:.3f}")
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


__getattr__ = renamed_names(__name__, Variant="ExitVariant", compute="exit_cost")
