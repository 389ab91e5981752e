"""How exactly a running stream computes what the offline forward of the whole sequence computes.

In half precision the two round differently (matrices of other shapes are summed in another order), so that choices
between nearly equal logits may differ. Selections of tokens are taken from the stream, see `mmskip.replay`.

Shapes: F frames, N tokens per frame, C feature channels, T tokens of the stream, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import mmskip
from mmskip.models.narrator import speaks
from mmskip.models.stream import StreamEngine, StreamSettings
from mmskip.replay import Replay, Selections, replaying
from mmskip.routers import TEXT


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


class _Recorder(StreamEngine):
    """One stream that remembers its tokens and the logits it chose by."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ids: list[int] = []
        self.layout: list[int] = []
        self.chosen: dict[int, tuple[bool, Tensor]] = {}

    def _call(self, parts: Sequence[Any]) -> list[Tensor]:
        start, part, size = self.cache.totals[0], parts[0], self.frame_tokens
        seen = self._streams[0].seen
        logits = super()._call(parts)
        # what stood behind here was cropped
        del self.ids[start:], self.layout[start:]
        self.chosen = {place: found for place, found in self.chosen.items() if place < start}
        self.ids += part.text
        self.layout += [TEXT] * len(part.text)
        for index in range(len(part.frames)):
            self.ids += [self.model.ids.silent] * bool(index) + [0] * size
            self.layout += [TEXT] * bool(index) + [seen + index] * size
            if seen + index > 0:
                self.chosen[len(self.ids) - 1] = (True, logits[0][index].float())
        if part.then == "pick":
            self.chosen[len(self.ids) - 1] = (False, logits[0][0].float())
        return logits

    def trim(self) -> None:
        """Leave out what was cropped last."""
        total = self.cache.totals[0]
        del self.ids[total:], self.layout[total:]
        self.chosen = {place: found for place, found in self.chosen.items() if place < total}


@torch.no_grad()
def compare(
    model: Any, features: Tensor, head: Sequence[int], settings: StreamSettings, exact_head: bool = False
) -> Comparison:
    """Watch one video as a stream, and compare it with one forward over the whole sequence under its selections.

    Args:
        model: a `VideoLLM`, in evaluation mode.
        features: [F, N, C].
        head: ids before the first frame.
        settings: without a window.
        exact_head: both compute their logits from the last hidden states in fp32.

    Raises:
        ValueError: settings with a window, or `exact_head` with a head that is no plain linear layer.
    """
    if settings.window is not None:
        raise ValueError(f"window is {settings.window}; the offline forward sees the whole stream, so leave it out")
    settings = replace(settings, temperature=0.0)
    found = Comparison()
    with ExitStack() as stack:
        if exact_head:
            stack.enter_context(_fp32_head(model.llm))
        stream = _Recorder(model, features.shape[1], settings, [list(head)])
        stream.push(features)
        with mmskip.trace(model.llm) as trace:
            stream.run()
        stream.trim()
        replay: Replay | None = None
        routing: dict[str, Tensor] = {}
        layout = torch.tensor([stream.layout], device=model.device)
        if mmskip.applied(model.llm):
            replay = stack.enter_context(replaying(Selections.of(trace)))
            routing = {"layout": layout}
        ids = torch.tensor([stream.ids], device=model.device)
        embeds = model.embed(ids, layout, features.to(model.device)).to(model.llm.dtype)
        logits = model.llm(inputs_embeds=embeds, use_cache=False, **routing).logits[0].float()
    if replay is not None:
        found.compared, found.flipped = replay.compared, replay.flipped
    for place, (decision, streamed) in stream.chosen.items():
        _judge(found, place, decision, streamed, logits[place], model, settings.threshold)
    return found


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


@contextmanager
def _fp32_head(llm: Any) -> Iterator[None]:
    head = llm.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(f"the head is a {type(head).__name__}; exact_head needs a plain linear layer")
    bias = None if head.bias is None else head.bias.float()

    def exact(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return nn.functional.linear(args[0].float(), module.weight.float(), bias)  # type: ignore[arg-type]

    handle = head.register_forward_hook(exact)
    try:
        yield
    finally:
        handle.remove()
