"""Running streams: frames in, text out when the model wants to speak or is asked, over a cache that may be bounded.

The template is that of `mmskip.datasets.narration.turns`; a question closes the stream part and is answered at once:

    <bos>instruction\\n[FRAME,FRAME]\\nAssistant: text<eos>\\n[FRAME]\\nUser: question\\nAssistant: answer<eos>\\n[FRAME

Shapes: B streams, T tokens of a call, F frames, N tokens per frame, C feature channels, V vocabulary.
"""

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import mmskip
from mmskip import families
from mmskip.hf.streaming.cache import StreamCache
from mmskip.hf.streaming.dense_cache import DenseCache
from mmskip.hf.streaming.slot_ledger import TEXT_PIECE, bound_entries
from mmskip.models.common.fp32_head import head_only_at
from mmskip.models.video_llm.speaking import StreamUtterance, TokenIds, speaks
from mmskip.models.video_llm.streaming.packing import Packed, Part, Stream, next_part, pack
from mmskip.models.video_llm.streaming.settings import StreamSettings
from mmskip.tokens.groups import TEXT


class Watcher(Protocol):
    """The part of a model that the engine uses; `mmskip.models.video_llm.VideoLLM` is one."""

    llm: Any

    @property
    def ids(self) -> TokenIds:
        """Token ids of the template."""

    def embed(self, input_ids: Tensor, layout: Tensor, features: Tensor) -> Tensor:
        """Token embeddings [B, T, D]; features [F, N, C] stand at the vision positions."""


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
        self._streams = [Stream(list(head), list(model.ids.open)) for head in heads]
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
        """Number of questions asked of each stream, which is the number of the next one."""
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
        """Bytes that each layer stores of a token. Configs state it in several ways, so one token is run over a
        temporary cache."""
        cache: Any = self._make_cache(1)
        token = Packed(np.full((1, 1), self.model.ids.eos), np.full((1, 1), TEXT), [1], [], [0], [0])
        with torch.no_grad():
            self._forward(token, cache)
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
            self._streams[number] = Stream(**{**values, "frames": deque(frames), "questions": questions})
            self._draws[number].set_state(tensors[f"draw.{number}"].cpu())

    # --- running --------------------------------------------------------------------------------------------------

    def run(self) -> list[StreamUtterance]:
        """Watch, decide, speak and answer until there is nothing left to do."""
        said: list[StreamUtterance] = []
        while (now := self.step()) is not None:
            said += now
        return said

    @torch.no_grad()
    def step(self) -> list[StreamUtterance] | None:
        """One call of the model, for all streams that have something to do.

        Returns:
            Texts that it finished; None if there was nothing to do.

        Raises:
            ValueError: the stream is longer than the model's range; no state has changed then.
        """
        parts = [self._next(number) for number in range(len(self._streams))]
        if all(part is None for part in parts):
            return None
        logits = self._call(parts)
        said = []
        for number, (part, asked) in enumerate(zip(parts, logits, strict=True)):
            if part is not None:
                said += self._take(number, part, asked)
        return said

    def _next(self, number: int) -> Part | None:
        part = next_part(self._streams[number], self.model.ids, self.settings.chunk)
        if part is None or not part.frames:
            return part
        # keys are rotated back between calls only, so all frames of a call share one base
        first = self.cache.totals[number] + len(part.text) + self.frame_tokens - 1
        base, frames = self.cache.base_of(first), list(part.frames)
        while self.cache.base_of(first + (len(frames) - 1) * (self.frame_tokens + 1)) != base:
            frames.pop()
        return part._replace(frames=frames)

    def _call(self, parts: Sequence[Part | None]) -> list[Tensor]:
        """Logits [V] or [F, V] that each part asked for."""
        packed = pack(parts, [row.seen for row in self._streams], self.model.ids.silent, self.frame_tokens)
        logits, found = self._forward(packed), np.array(packed.rows)
        return [
            logits[torch.from_numpy(np.flatnonzero(found == number)).to(logits.device)] for number in range(len(parts))
        ]

    def _forward(self, packed: Packed, cache: Any = None) -> Tensor:
        """Logits [P, V] at the places of a batch, over `cache` (None: that of the streams)."""
        cache = self.cache if cache is None else cache
        announced = cache.begin(packed.layout, packed.lengths, self.model.llm.dtype)
        layout_BT = torch.from_numpy(packed.layout).to(self._device)
        features = torch.stack(packed.frames) if packed.frames else self._no_frames()
        embeds = self.model.embed(torch.from_numpy(packed.input_ids).to(self._device), layout_BT, features)
        at = torch.tensor(packed.rows, dtype=torch.long), torch.tensor(packed.cols, dtype=torch.long)
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

    def _take(self, number: int, part: Part, logits: Tensor) -> list[StreamUtterance]:
        row = self._streams[number]
        if part.then == "decide":
            self._decide(number, part, logits)
            return []
        if row.words is None and row.question_due:
            row.text = row.question_text(self.model.ids)
            question, _, _ = row.questions.popleft()
            row.words, row.answering, row.opened = [], question, False
        elif row.words is None:
            row.text, row.opener = [*row.text, *row.opener], []
        row.text = row.text[len(part.text) :]
        return self._speak(number, logits[0]) if part.then == "pick" else []

    def _decide(self, number: int, part: Part, logits: Tensor) -> None:
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
        if speaking and not row.question_due:
            row.text, row.words, row.answering, row.opened = [ids.speak, *ids.assistant], [], None, False

    def _speak(self, number: int, logits: Tensor) -> list[StreamUtterance]:
        row, ids = self._streams[number], self.model.ids
        assert row.words is not None
        token = self._pick(number, logits)
        if token != ids.eos:
            row.words.append(token)
            if len(row.words) < self.settings.max_new_tokens:
                row.text = [token]
                return []
        said = StreamUtterance(number, row.seen - 1, tuple(row.words), row.answering)
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
