"""Compare a running stream with the offline forward of its full sequence.

In half precision the two round their hidden states differently (matrices of other shapes are summed in another order),
so that choices between nearly equal logits may differ. Logits themselves are not rounded
(`mmskip.models.common.fp32_head`), and selections of tokens are taken from the stream (`mmskip.replay`).

Shapes: F frames, N tokens per frame, C feature channels, T tokens of the stream, V vocabulary.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import mmskip
from mmskip.models.common.fp32_head import head_only_at
from mmskip.models.video_llm.speaking import speaks
from mmskip.models.video_llm.streaming.engine import StreamEngine
from mmskip.models.video_llm.streaming.settings import StreamSettings
from mmskip.replay import Selections, replaying
from mmskip.tokens.groups import TEXT


@dataclass(frozen=True)
class Difference:
    """A choice that the offline forward makes differently.

    Attributes:
        position: of the predicting token in the stream.
        decision: whether to speak was chosen there; else a word.
        margin: by how much the offline forward prefers its own choice, in logits.
        resolution: distance of neighbouring numbers of the model's dtype at its largest logit there.
    """

    position: int
    decision: bool
    margin: float
    resolution: float


@dataclass
class Comparison:
    """Streams beside their offline forwards.

    Attributes:
        choices: decisions to speak or not, and words.
        different: those that differ.
        largest: largest difference of a logit.
        compared, flipped: selected vision tokens, and those that the offline forward would not have selected itself.
    """

    choices: int = 0
    different: list[Difference] = field(default_factory=list)
    largest: float = 0.0
    compared: int = 0
    flipped: int = 0


@dataclass
class _Record:
    """One stream: its tokens, and the logits [V] that were chosen by, with whether they decided, by position."""

    ids: list[int] = field(default_factory=list)
    layout: list[int] = field(default_factory=list)
    chosen: dict[int, tuple[bool, Tensor]] = field(default_factory=dict)

    def cut(self, total: int) -> None:
        """Drop everything from `total` on."""
        del self.ids[total:], self.layout[total:]
        self.chosen = {place: found for place, found in self.chosen.items() if place < total}


class _Recorder(StreamEngine):
    """Streams that remember their tokens and choices. `rounded`: they choose by logits of the model's dtype."""

    def __init__(self, *args: Any, rounded: bool = False) -> None:
        super().__init__(*args)
        self.rounded = rounded
        self.records = [_Record() for _ in self._streams]

    def _call(self, parts: Sequence[Any]) -> list[Tensor]:
        starts, size, ids = list(self.cache.totals), self.frame_tokens, self.model.ids
        seen = self.frames_seen
        logits = super()._call(parts)
        if self.rounded:
            logits = [row.to(self.model.llm.dtype) for row in logits]
        for number, part in enumerate(parts):
            if part is None:
                continue
            record = self.records[number]
            record.cut(starts[number])
            record.ids += part.text
            record.layout += [TEXT] * len(part.text)
            for index in range(len(part.frames)):
                record.ids += [ids.silent] * bool(index) + [0] * size
                record.layout += [TEXT] * bool(index) + [seen[number] + index] * size
                if seen[number] + index > 0:
                    record.chosen[len(record.ids) - 1] = (True, logits[number][index].float())
            if part.then == "pick":
                record.chosen[len(record.ids) - 1] = (False, logits[number][0].float())
        return logits

    def reopened(self) -> "_Recorder":
        """Save and restore the streams."""
        heads: list[list[int]] = [[] for _ in self._streams]
        other = _Recorder(self.model, self.frame_tokens, self.settings, heads, rounded=self.rounded)
        other.restore(*self.state())
        other.records = self.records
        return other


@torch.no_grad()
def compare(
    model: Any,
    videos: Sequence[Tensor],
    head: Sequence[int],
    settings: StreamSettings,
    rounded: bool = False,
    reopen_after: int | None = None,
) -> Comparison:
    """Watch videos as streams of one batch, and compare each with one forward over its full sequence under its
    selections.

    Args:
        model: a `VideoLLM`, in evaluation mode.
        videos: [F, N, C] each.
        head: ids before the first frame.
        settings: without a window.
        rounded: both choose by logits rounded to the model's dtype, as its head alone would give them.
        reopen_after: the streams are saved and restored after so many calls; None: never.

    Raises:
        ValueError: settings with a window.
    """
    if settings.window is not None:
        raise ValueError(f"window is {settings.window}; the offline forward sees the full stream, so omit it")
    settings = replace(settings, temperature=0.0)
    found = Comparison()
    heads = [list(head) for _ in videos]
    streams = _Recorder(model, videos[0].shape[1], settings, heads, rounded=rounded)
    for number, features in enumerate(videos):
        streams.push(features, number)
    with mmskip.trace(model.llm) as trace:
        calls = 0
        while streams.step() is not None:
            calls += 1
            if calls == reopen_after:
                streams = streams.reopened()
    selections = Selections.of(trace) if mmskip.applied(model.llm) else None
    for number, features in enumerate(videos):
        record = streams.records[number]
        record.cut(streams.cache.totals[number])
        with ExitStack() as stack:
            replay = None
            if selections is not None:
                replay = stack.enter_context(replaying(selections.of_row(number)))
            logits = _offline(model, record, features)
        if replay is not None:
            found.compared += replay.compared
            found.flipped += replay.flipped
        if rounded:
            logits = logits.to(model.llm.dtype)
        for (place, (decision, streamed)), offline in zip(record.chosen.items(), logits.float(), strict=True):
            _judge(found, place, decision, streamed, offline, model, settings.threshold)
    return found


def _offline(model: Any, record: _Record, features: Tensor) -> Tensor:
    """Logits [P, V] of one forward over a stream, where it chose."""
    layout = torch.tensor([record.layout], device=model.device)
    ids = torch.tensor([record.ids], device=model.device)
    embeds = model.embed(ids, layout, features.to(model.device)).to(model.llm.dtype)
    cols = torch.tensor(list(record.chosen), dtype=torch.long, device=model.device)
    routing = {"layout": layout} if mmskip.applied(model.llm) else {}
    with head_only_at(model.llm, torch.zeros_like(cols), cols):
        logits: Tensor = model.llm(inputs_embeds=embeds, use_cache=False, **routing).logits
    return logits


def _judge(
    found: Comparison, place: int, decision: bool, streamed: Tensor, offline: Tensor, model: Any, threshold: float
) -> None:
    """Count one choice, from the logits [V] of both."""
    silent = model.ids.silent
    found.choices += 1
    found.largest = max(found.largest, float((streamed - offline).abs().max()))
    if decision:
        same = bool(speaks(streamed, silent, threshold)) == bool(speaks(offline, silent, threshold))
        margin = _decision_margin(offline, silent, threshold)
    else:
        same = int(streamed.argmax()) == int(offline.argmax())
        margin = float(offline.max() - offline[streamed.argmax()])
    if not same:
        top = max(float(offline.abs().max()), 1e-9)
        resolution = 2.0 ** math.floor(math.log2(top)) * torch.finfo(model.llm.dtype).eps
        found.different.append(Difference(place, decision, margin, resolution))


def _decision_margin(logits: Tensor, silent: int, threshold: float) -> float:
    """By how much the logit of the silent token would have to change for another decision."""
    others = logits.clone()
    others[silent] = -torch.inf
    margins = [float((logits[silent] - others.max()).abs())]
    if 0 < threshold < 1:
        margins.append(abs(float(logits[silent] - others.logsumexp(0)) - math.log(threshold / (1 - threshold))))
    return min(margins)
