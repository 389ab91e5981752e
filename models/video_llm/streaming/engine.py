"""Running streams: frames in, text out when the model wants to speak or is asked, over a cache that may be bounded.

The template is that of `mmskip.datasets.narration.turns`; a question closes the stream part and is answered at once:

    <bos>instruction\\n[FRAME,FRAME]\\nAssistant: text<eos>\\n[FRAME]\\nUser: question\\nAssistant: answer<eos>\\n[FRAME

Shapes: B streams, T tokens of a call, F frames, N tokens per frame, C feature channels, V vocabulary.
"""

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

import mmskip
from mmskip import families
from mmskip.hf.streaming.cache import POSITIONS, StreamCache
from mmskip.hf.streaming.dense_cache import DenseCache
from mmskip.hf.streaming.slot_ledger import TEXT_PIECE, bound_entries
from mmskip.models.common.fp32_head import head_only_at
from mmskip.models.video_llm.speaking import TokenIds, speaks
from mmskip.tokens.groups import TEXT


class Watcher(Protocol):
    """What the engine needs of a model; `mmskip.models.video_llm.VideoLLM` is one."""

    llm: Any

    @property
    def ids(self) -> TokenIds:
        """Token ids of the template."""

    def embed(self, input_ids: Tensor, layout: Tensor, features: Tensor) -> Tensor:
        """Token embeddings [B, T, D]; features [F, N, C] stand at the vision positions."""


@dataclass(frozen=True)
class StreamSettings:
    """How streams are watched.

    Attributes:
        window: tokens a token looks back on, itself included; None: the whole stream. At least one frame and its
            separator.
        sinks: first tokens of a stream that stay visible under a window, >= 0.
        positions: `absolute` or `rolling`, see `mmskip.hf.streaming.cache.StreamCache`.
        position_range: positions the model has; None: as its config says.
        chunk: most frames of one stream in one call, >= 1. What is said does not depend on it.
        threshold: a silent token below this probability is set to zero, in [0, 1]; 0: plain argmax.
        max_new_tokens: longest text, tokens, >= 1.
        temperature: of sampling, >= 0; 0: greedy.
        top_p: sample among the likeliest tokens that together have this probability, in (0, 1].
        seed: of sampling, >= 0; each stream draws for itself.
    """

    window: int | None = None
    sinks: int = 0
    positions: str = "absolute"
    position_range: int | None = None
    chunk: int = 1
    threshold: float = 0.725
    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"window": 1, "sinks": 0, "position_range": 1, "chunk": 1, "max_new_tokens": 1, "seed": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name} is {value!r}; expected an integer >= {low}.")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}; expected one of {', '.join(POSITIONS)}.")
        if self.sinks and self.window is None:
            raise ValueError(f"sinks is {self.sinks} without a window; give a window, or leave the sinks out.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold!r}; expected a number from 0 to 1.")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature is {self.temperature!r} and top_p {self.top_p!r}; expected a number >= 0 and one in "
                "(0, 1]."
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StreamSettings":
        """From `to_dict`."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})


class Said(NamedTuple):
    """A text of the model.

    Attributes:
        stream: number of the stream.
        frame: the last frame it had watched; -1: none.
        tokens: ids without eos.
        question: number of the question it answers, as `ask` gave it; None: it spoke by itself.
    """

    stream: int
    frame: int
    tokens: tuple[int, ...]
    question: int | None


@dataclass
class _Stream:
    """One stream on the host.

    Attributes:
        text: ids the model has not seen yet, before `opener`.
        opener: what stands before the next frame: the silent token, or `\\n[`.
        opened: whether the last thing the model saw is a frame.
        frames: [N, C] each, not watched yet; `seen` were.
        questions: (number, frames to be watched before, ids).
        words: of the text being spoken; None: watching.
    """

    text: list[int]
    opener: list[int]
    opened: bool = False
    frames: deque[Tensor] = field(default_factory=deque)
    seen: int = 0
    questions: deque[tuple[int, int, list[int]]] = field(default_factory=deque)
    asked: int = 0
    words: list[int] | None = None
    answering: int | None = None


class _Part(NamedTuple):
    """What one stream brings to a call: text, then frames with a silent token between them. `then` says what is done
    with the logits behind it: nothing (more text follows), "decide", or "pick" the next word."""

    text: list[int]
    frames: list[Tensor]
    then: str


class StreamEngine:
    """Watches several streams at once, each at its own pace.

    Args:
        model: the video LLM; used in evaluation mode.
        frame_tokens: N.
        settings: see `StreamSettings`.
        heads: for each stream, the ids before the first `\\n[`: `<bos>` and the instruction.

    Raises:
        ValueError: a window smaller than one frame, or settings that the language model cannot serve.
    """

    def __init__(
        self, model: Watcher, frame_tokens: int, settings: StreamSettings, heads: Sequence[Sequence[int]]
    ) -> None:
        if settings.window is not None and settings.window < frame_tokens + 1:
            raise ValueError(
                f"window is {settings.window} tokens, one frame has {frame_tokens} and a separator; give a window of "
                f"at least {frame_tokens + 1}."
            )
        self.model, self.frame_tokens, self.settings = model, frame_tokens, settings
        self._device = model.llm.get_input_embeddings().weight.device
        self._streams = [_Stream(list(head), list(model.ids.open)) for head in heads]
        self._draws = [torch.Generator().manual_seed(settings.seed + row) for row in range(len(heads))]
        self._routed = bool(mmskip.applied(model.llm))
        self.cache: Any = self._make_cache(len(heads))

    def _make_cache(self, streams: int) -> StreamCache | DenseCache:
        llm, settings = self.model.llm, self.settings
        try:
            view = families.find(llm)
        except ValueError:
            view = None
        if view is not None and set(view.attention_types()) <= {"full", "sliding"}:
            return StreamCache(
                view,
                streams,
                settings.window,
                settings.sinks,
                settings.positions,
                settings.position_range,
                self.frame_tokens + TEXT_PIECE,
                self._device,
            )
        if streams > 1 or settings.chunk > 1 or settings.window is not None or settings.positions != "absolute":
            raise ValueError(
                f"{type(llm).__name__} is no decoder of attention blocks only that mmskip knows; it can be watched as "
                "one stream, with chunk=1, without a window and at absolute positions."
            )
        return DenseCache(llm.config, settings.position_range, self._device)

    # --- input ----------------------------------------------------------------------------------------------------

    def push(self, features: Tensor, stream: int = 0) -> None:
        """Show frames to a stream; `run` watches them.

        Args:
            features: [F, N, C].
            stream: its number.
        """
        if features.dim() != 3 or features.shape[1] != self.frame_tokens:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [F, {self.frame_tokens}, C].")
        self._streams[stream].frames.extend(features.to(self._device))

    def ask(self, ids: Sequence[int], stream: int = 0) -> int:
        """Ask a question once all frames pushed so far are watched.

        Args:
            ids: the question with its `\\nUser:`, see `mmskip.datasets.narration.tokenizer.StreamTokens.question`.
            stream: its number.

        Returns:
            The number of the question.
        """
        if not ids:
            raise ValueError("a question needs at least one token, got none.")
        row = self._streams[stream]
        row.questions.append((row.asked, row.seen + len(row.frames), list(ids)))
        row.asked += 1
        return row.asked - 1

    @property
    def frames_seen(self) -> list[int]:
        """Frames each stream has watched."""
        return [row.seen for row in self._streams]

    @property
    def questions_asked(self) -> list[int]:
        """How many questions each stream was asked; the next one has this number."""
        return [row.asked for row in self._streams]

    def kv_bound(self) -> int | None:
        """The most bytes that keys and values of all streams can ever take, buffers included; None without a window.

        Counted for text only, of which a routed layer stores every token; frames take less."""
        if self.settings.window is None:
            return None
        total = 0
        for own, entry_bytes in zip(self.cache.view.windows, self._entry_bytes, strict=True):
            sinks = self.settings.sinks if own is None else 0
            window = min(self.settings.window, own or self.settings.window)
            total += bound_entries(window, sinks, self.frame_tokens, self.call_tokens) * entry_bytes
        return total * len(self._streams)

    @cached_property
    def _entry_bytes(self) -> tuple[int, ...]:
        """Bytes that each layer stores of a token. Configs tell it in many ways, so one token is run, over a cache that
        is then thrown away."""
        cache: Any = self._make_cache(1)
        layout = np.full((1, 1), TEXT)
        with torch.no_grad():
            announced = cache.begin(layout, [1], self.model.llm.dtype)
            self._forward(np.full((1, 1), self.model.ids.eos), layout, [], announced, [0], [0])
        return cache.entry_bytes

    @property
    def call_tokens(self) -> int:
        """The most tokens of one stream in one call."""
        return TEXT_PIECE + self.settings.chunk * (self.frame_tokens + 1)

    # --- saving ---------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that goes on: a JSON-ready part, and tensors by name, which may be views of buffers: save them
        before the streams go on. See `mmskip.models.video_llm.streaming.state`."""
        cache, tensors = self.cache.state()
        streams = []
        for number, row in enumerate(self._streams):
            values = {f.name: getattr(row, f.name) for f in fields(row)}
            streams.append({**values, "frames": len(row.frames), "questions": list(row.questions)})
            tensors[f"draw.{number}"] = self._draws[number].get_state()
            if row.frames:
                tensors[f"frames.{number}"] = torch.stack(list(row.frames))
        return copy.deepcopy({"settings": self.settings.to_dict(), "streams": streams, "cache": cache}), tensors

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave, in an engine of the same model and settings."""
        self.cache.restore(state["cache"], tensors)
        for number, values in enumerate(state["streams"]):
            frames = tensors[f"frames.{number}"].to(self._device) if values["frames"] else ()
            questions = deque((number, after, ids) for number, after, ids in values["questions"])
            self._streams[number] = _Stream(**{**values, "frames": deque(frames), "questions": questions})
            self._draws[number].set_state(tensors[f"draw.{number}"].cpu())

    # --- running --------------------------------------------------------------------------------------------------

    def run(self) -> list[Said]:
        """Watch, decide, speak and answer until there is nothing left to do."""
        said: list[Said] = []
        while (now := self.step()) is not None:
            said += now
        return said

    @torch.no_grad()
    def step(self) -> list[Said] | None:
        """One call of the model, for all streams that have something to do.

        Returns:
            Texts that were finished by it; None if nothing was left to do.

        Raises:
            ValueError: the stream is longer than the model's range; no state has changed then.
        """
        parts = [self._next(number) for number in range(len(self._streams))]
        if all(part is None for part in parts):
            return None
        logits = self._call(parts)
        said = []
        for number, (part, behind) in enumerate(zip(parts, logits, strict=True)):
            if part is not None:
                said += self._take(number, part, behind)
        return said

    def _next(self, number: int) -> _Part | None:
        row, ids = self._streams[number], self.model.ids
        if row.words is not None:
            return self._piece(row.text, "pick")
        if row.questions and row.questions[0][1] <= row.seen:
            close = [ids.speak] if row.opened else []
            return self._piece([*row.text, *close, *row.questions[0][2], *ids.assistant], "pick")
        if not row.frames:
            return None
        text = [*row.text, *row.opener]
        if len(text) > TEXT_PIECE:
            return self._piece(text, "none", TEXT_PIECE)
        most = self.settings.chunk
        if row.questions:
            most = min(most, row.questions[0][1] - row.seen)
        frames = [frame for frame, _ in zip(row.frames, range(most), strict=False)]
        # keys are turned back between calls only, so all frames of a call share one base
        first = self.cache.totals[number] + len(text) + self.frame_tokens - 1
        base = self.cache.base_of(first)
        while self.cache.base_of(first + (len(frames) - 1) * (self.frame_tokens + 1)) != base:
            frames.pop()
        return _Part(text, frames, "decide")

    def _piece(self, text: list[int], then: str, most: int = TEXT_PIECE) -> _Part:
        """The first tokens of a text: a long one takes several calls, of lengths that do not depend on the chunk."""
        return _Part(text[:most], [], then if len(text) <= most and then != "none" else "none")

    def _call(self, parts: Sequence[_Part | None]) -> list[Tensor]:
        """Logits [V] or [F, V] that each part asked for."""
        ids, tokens = self.model.ids, self.frame_tokens
        rows, cols = [], []
        lines: list[tuple[list[int], list[int]]] = []
        for number, part in enumerate(parts):
            line: list[int] = [] if part is None else list(part.text)
            layout = [TEXT] * len(line)
            for index, _ in enumerate(part.frames if part else ()):
                if index:
                    line.append(ids.silent)
                    layout.append(TEXT)
                line += [0] * tokens
                layout += [self._streams[number].seen + index] * tokens
                rows.append(number)
                cols.append(len(line) - 1)
            if part is not None and part.then == "pick":
                rows.append(number)
                cols.append(len(line) - 1)
            lines.append((line, layout))
        lengths = [len(line) for line, _ in lines]
        width = max(lengths)
        input_ids = np.array([line + [0] * (width - len(line)) for line, _ in lines])
        layout_BT = np.array([layout + [TEXT] * (width - len(layout)) for _, layout in lines])
        announced = self.cache.begin(layout_BT, lengths, self.model.llm.dtype)
        frames = [frame for part in parts if part is not None for frame in part.frames]
        logits = self._forward(input_ids, layout_BT, frames, announced, rows, cols)
        found = np.array(rows)
        return [
            logits[torch.from_numpy(np.flatnonzero(found == number)).to(logits.device)] for number in range(len(parts))
        ]

    def _forward(
        self,
        input_ids: np.ndarray,
        layout: np.ndarray,
        frames: Sequence[Tensor],
        announced: dict[str, Any],
        rows: list[int],
        cols: list[int],
    ) -> Tensor:
        layout_BT = torch.from_numpy(layout).to(self._device)
        features = torch.stack(list(frames)) if frames else self._no_frames()
        embeds = self.model.embed(torch.from_numpy(input_ids).to(self._device), layout_BT, features)
        at = torch.tensor(rows, dtype=torch.long), torch.tensor(cols, dtype=torch.long)
        with head_only_at(self.model.llm, *(index.to(self._device) for index in at)):
            out = self.model.llm(
                inputs_embeds=embeds.to(self.model.llm.dtype),
                **announced,
                **({"layout": layout_BT} if self._routed else {}),
            )
        if isinstance(self.cache, DenseCache):
            self.cache.end(out)
        return out.logits

    def _no_frames(self) -> Tensor:
        return torch.zeros(0, self.frame_tokens, self.model.connector[0].in_features, device=self._device)  # type: ignore[attr-defined]

    # --- what follows from a call -----------------------------------------------------------------------------------

    def _take(self, number: int, part: _Part, logits: Tensor) -> list[Said]:
        row = self._streams[number]
        if part.then == "decide":
            self._decide(number, part, logits)
            return []
        asking = row.words is None and bool(row.questions) and row.questions[0][1] <= row.seen
        if asking:
            # what the question replaces is now part of the text
            close = [self.model.ids.speak] if row.opened else []
            question, _, ids = row.questions[0]
            row.text = [*row.text, *close, *ids, *self.model.ids.assistant]
            row.questions.popleft()
            row.words, row.answering, row.opened = [], question, False
        elif row.words is None:
            row.text, row.opener = [*row.text, *row.opener], []
        row.text = row.text[len(part.text) :]
        return self._speak(number, logits[0]) if part.then == "pick" else []

    def _decide(self, number: int, part: _Part, logits: Tensor) -> None:
        """Watch the frames of a part up to the first one at which the model speaks."""
        row, ids = self._streams[number], self.model.ids
        wants = speaks(logits, ids.silent, self.settings.threshold).tolist()
        # the decision at the first frame is not learned and therefore not taken
        speaking = [index for index, want in enumerate(wants) if want and row.seen + index > 0]
        watched = speaking[0] + 1 if speaking else len(part.frames)
        left = len(part.frames) - watched
        if left:
            self.cache.crop_stream(number, self.cache.totals[number] - left * (self.frame_tokens + 1))
        for _ in range(watched):
            row.frames.popleft()
        row.seen += watched
        row.text, row.opener, row.opened = [], [ids.silent], True
        # a question at this frame is answered instead
        if speaking and not (row.questions and row.questions[0][1] <= row.seen):
            row.text, row.words, row.answering, row.opened = [ids.speak, *ids.assistant], [], None, False

    def _speak(self, number: int, logits: Tensor) -> list[Said]:
        row, ids = self._streams[number], self.model.ids
        assert row.words is not None
        token = self._pick(number, logits)
        if token != ids.eos:
            row.words.append(token)
            if len(row.words) < self.settings.max_new_tokens:
                row.text = [token]
                return []
        said = Said(number, row.seen - 1, tuple(row.words), row.answering)
        # the eos, and a last word cut off by the limit, have not been seen by the model yet
        unseen = row.words[-1:] if token != ids.eos else []
        row.text, row.opener, row.words, row.answering = [*unseen, ids.eos], list(ids.open), None, None
        return [said]

    def _pick(self, number: int, logits: Tensor) -> int:
        if self.settings.temperature == 0:
            return int(logits.argmax())
        chances = (logits.float().cpu() / self.settings.temperature).softmax(-1)
        ordered, order = chances.sort(descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(0) - ordered >= self.settings.top_p, 0)
        return int(order[torch.multinomial(ordered, 1, generator=self._draws[number])])
