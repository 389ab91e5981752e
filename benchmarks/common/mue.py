"""Parts of benchmarks/mue.py: pictures of a seed, ways of exiting early, their quality and cost."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmskip import EarlyExitConfig
from mmskip.datasets.captioning.batch import CaptionCollate, PictureDataset
from mmskip.datasets.captioning.module import CaptionData
from mmskip.datasets.synthetic.captions import SceneCaptionsConfig
from mmskip.exits.criteria import Saturation
from mmskip.exits.settings import ExitAt, FixedExit
from mmskip.methods.early_exit import exit_heads
from mmskip.models.captioner.metrics import score_captions
from mmskip.models.captioner.module import Captioner
from mmskip.train.evaluation.captioner.exit_sweep import exit_cost, recording, using
from mmskip.train.evaluation.captioner.generation import captioned
from mmskip.train.evaluation.captioner.snli_ve import judged
from mmskip.train.evaluation.captioner.task import Batch, encoded
from mmskip.utils.timing import Ratio, interleaved_ratio

PARTS = {"image": "image", "text": "prompt", "decoder": "decoder"}
"""Kinds of states that exit, and their keys in the record of a sample."""
SCORED = EarlyExitConfig(image=0.99, text=0.99, decoder=0.99)
"""A score after every layer; see `_never`."""
ONE_LAYER = EarlyExitConfig(encoder=FixedExit(1), decoder=FixedExit(1))
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Call = Callable[[Captioner], Any]
Odds = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """A way of exiting early.

    Attributes:
        way: `full`, `mue`, `entropy`, `patience`, `random`, `shallow`, ...
        config: None: every layer runs.
        odds: of `random`: by kind of state, the probability that it exits after layer 1, 2, ... if it got there.
    """

    way: str
    config: EarlyExitConfig | None = None
    odds: Odds = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict for the file of chosen settings."""
        return {"way": self.way, "config": self.config.to_dict() if self.config else None, "odds": self.odds}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Setting":
        """Inverse of `to_dict`; further keys do not matter."""
        config = stored["config"]
        return cls(stored["way"], EarlyExitConfig.from_dict(config) if config else None, stored["odds"])


# --- random exits ---------------------------------------------------------------------------------------------------


class _Chance:
    """Score of a learned head that exits at random.

    Args:
        odds: probability.
        generator: of the random numbers.
    """

    def __init__(self, odds: float, generator: torch.Generator) -> None:
        self.odds, self.generator = odds, generator

    def __call__(self, x_BTD: Tensor) -> Tensor:
        return (torch.rand(x_BTD.shape[:2], generator=self.generator) < self.odds).float()


def at_random(rows: Sequence[dict[str, Any]], model: Captioner, like: EarlyExitConfig) -> Setting:
    """Exits at the depths of `rows` and the points of `like`, whatever the state: the library's learned exits, whose
    heads draw lots."""
    odds = {}
    for part, name in PARTS.items():
        depth = len(model.view.decoder if part == "decoder" else model.view.encoder)
        ran = torch.tensor([n for row in rows for n in all_of(row[name])])
        left = torch.stack([(ran == layer).sum() for layer in range(1, depth)])
        there = torch.stack([(ran >= layer).sum() for layer in range(1, depth)])
        odds[part] = (left / there.clamp(min=1)).tolist()
    exits = {}
    for part in PARTS:
        given = getattr(like, part)
        given = given if isinstance(given, ExitAt) else ExitAt(0.5)
        exits[part] = ExitAt(0.5, "learned", exit_layers=given.exit_layers, max_layers=given.max_layers)
    return Setting("random", EarlyExitConfig(**exits), odds)


def draw_lots(llm: Any, setting: Setting) -> None:
    """Let the heads of a `random` setting that was applied to `llm` draw lots."""
    if setting.odds:
        generator = torch.Generator().manual_seed(0)
        for part, heads in exit_heads(llm).items():
            for layer, head in heads.items():
                head.score = _Chance(setting.odds[part][layer - 1], generator)


# --- pictures -------------------------------------------------------------------------------------------------------


class Pictures:
    """Pictures of one seed with one kind of text each, read once.

    Args:
        data: of the run.
        folder: where sets are written.
        split: "val" or "test".
        seed: of the set.
        count: pictures.
    """

    def __init__(self, data: CaptionData, folder: Path, split: str, seed: int, count: int) -> None:
        config = replace(data.generated, **{"train": 1, "val": 1, "test": 1, "seed": seed, split: count})
        known = {name: getattr(config, name) for name in config.__dataclass_fields__}
        own = CaptionData(str(folder), SceneCaptionsConfig(**known), image_size=data.image_size)
        own.prepare_data()
        self.collate: CaptionCollate = data.collate()
        self.entries = own.entries(split)
        self.size = own.image_size
        self.captions = {entry.uid: entry.captions for entry in self.entries}

    def batches(self, task: str, size: int, blank: bool = False) -> list[Batch]:
        """All pictures with their captions, or with their pairs."""
        dataset = PictureDataset(self.entries, self.size, blank=blank)
        found = []
        for begin in range(0, len(dataset), size):
            batch = self.collate([dataset[n] for n in range(begin, min(begin + size, len(dataset)))])
            found.append({**batch, "entailment" if task == "caption" else "caption": None})
        return found

    def single(self, task: str, count: int) -> list[Batch]:
        """Samples one by one: of entailment one pair of each picture."""
        found = self.batches(task, 1)[:count]
        if task == "entailment":
            found = [{**b, task: b[task].rows([n % len(b[task].uids)])} for n, b in enumerate(found)]
        return found

    def together(self, task: str, rows: int) -> list[Batch]:
        """One batch of so many rows, each with a separate picture."""
        batch = self.batches(task, rows)[0]
        texts = batch[task]
        if task == "caption":
            return [{**batch, task: texts.first_of_each()}]
        first = [texts.image.tolist().index(n) for n in range(len(batch["image_ids"]))]
        return [{**batch, task: texts.rows(first)}]


# --- quality --------------------------------------------------------------------------------------------------------


def records(
    model: Captioner, task: str, batches: Sequence[Batch], setting: Setting, tokenizer: Any
) -> list[dict[str, Any]]:
    """Record the answers to every sample and the layers that ran."""
    found: list[dict[str, Any]] = []
    with torch.no_grad(), _exiting(model, setting), recording(model) as record:
        for batch in batches:
            record.clear()
            if task == "caption":
                found += captioned(model, batch, record, 1, tokenizer)
            else:
                found += [row for one in judged(model, batch, record) for row in one["rows"]]
    return found


@contextmanager
def _exiting(model: Captioner, setting: Setting) -> Iterator[None]:
    with using(model, setting.config):
        draw_lots(model.llm, setting)
        yield


def quality(task: str, rows: Sequence[dict[str, Any]], references: dict[str, tuple[str, ...]]) -> float:
    """Accuracy, or CIDEr."""
    if task == "entailment":
        return sum(row["right"] for row in rows) / len(rows)
    return score_captions({row["uid"]: row["caption"] for row in rows}, references).totals["CIDEr"]


def layers_run(rows: Sequence[dict[str, Any]]) -> float:
    """Mean layers per sample that ran; a token's layer counts as one call."""
    return sum(sum(all_of(row[part])) for row in rows for part in PARTS.values()) / len(rows)


def all_of(value: Any) -> list[int]:
    """A number or several."""
    return value if isinstance(value, list) else [value]


# --- cost -----------------------------------------------------------------------------------------------------------


def call_of(task: str, batch: Batch, tokens: int | None = None) -> Call:
    """Make the call to time, from pictures and texts to answers.

    Args:
        task: which.
        batch: see `Pictures`.
        tokens: length of the captions; None: until they end.
    """
    texts = batch[task]
    if task == "entailment":
        return lambda model: model.judge(*encoded(model, batch, texts))
    length = {} if tokens is None else {"min_new_tokens": tokens, "max_new_tokens": tokens}
    return lambda model: model.caption(*encoded(model, batch, texts), num_beams=1, **length)


def cost(model: Captioner, setting: Setting, calls: Sequence[Call], pairs: int, clock: str) -> dict[str, float]:
    """Counted FLOPs and measured time of the calls, as shares of full depth's; time by paired, interleaved runs."""
    with torch.no_grad():
        return exit_cost(model, setting.config, calls, pairs, CLOCKS[clock], ready=lambda llm: draw_lots(llm, setting))


def cost_of_other(
    model: Captioner, other: Captioner, calls: Sequence[Call], pairs: int, clock: str
) -> dict[str, float | None]:
    """Cost of the calls on another model, as a share of `model`'s."""

    def runs(one: Captioner) -> Callable[[], None]:
        return lambda: [call(one) for call in calls] and None

    with torch.no_grad():
        ratio: Ratio = interleaved_ratio(runs(model), runs(other), pairs, clock=CLOCKS[clock])
    return {
        "counted": None,
        "measured": 1 / ratio.median,
        "low": 1 / ratio.q3,
        "high": 1 / ratio.q1,
        "seconds": ratio.fn_s / len(calls),
    }


@contextmanager
def _never() -> Iterator[None]:
    """Saturation inside is computed and then too low for any threshold (one at its range's end would need no score)."""
    single = Saturation.single
    Saturation.single = lambda self, after, before: single(self, after, before) - 2  # type: ignore[method-assign]
    try:
        yield
    finally:
        Saturation.single = single  # type: ignore[method-assign]


def where_time_goes(model: Captioner, task: str, batches: Sequence[Batch], pairs: int, clock: str) -> dict[str, float]:
    """Milliseconds of a sample at full depth, and in it: everything but layers, the layers, and what scores add to
    them that never let anything exit. Captions have 24 tokens."""
    calls = [call_of(task, batch, 24) for batch in batches]
    with torch.no_grad():
        one = exit_cost(model, ONE_LAYER, calls, pairs, CLOCKS[clock])
        with _never():
            never = exit_cost(model, SCORED, calls, pairs, CLOCKS[clock])
    tokens = 1 if task == "entailment" else 24
    encoder, decoder = len(model.view.encoder), len(model.view.decoder)
    most, least = 2 * encoder + tokens * decoder, 2 + tokens
    full = 1000 * never["seconds"] / never["measured"]
    layer = full * (1 - one["measured"]) / (most - least)
    return {
        "full": full,
        "besides_layers": full - most * layer,
        "layers": most * layer,
        "scores": full * (never["measured"] - 1),
    }
