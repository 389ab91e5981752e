"""Play a video to a streaming model: frames in, time-stamped texts and cost out.

Shapes: F frames, N vision tokens per frame, C feature channels.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmskip
from mmskip.datasets.narration.tokenizer import StreamTokens
from mmskip.models.video_llm.speaking import StreamUtterance
from mmskip.models.video_llm.streaming.engine import StreamEngine
from mmskip.replay import Selections


@dataclass(frozen=True)
class Question:
    """A question of the user.

    Attributes:
        time_s: asked when the frame shown then has been watched, seconds from the start.
        text: its words.
    """

    time_s: float
    text: str

    @classmethod
    def parse(cls, given: str) -> "Question":
        """From `"0:12 what is moving?"`: hours and minutes may be left out, seconds may have decimals.

        Raises:
            ValueError: no time or no text.
        """
        found = re.fullmatch(r"\s*(?:(\d+):)??(?:(\d+):)?(\d+(?:\.\d+)?)s?\s+(\S.*)", given)
        if found is None:
            raise ValueError(f"question {given!r}: expected a time and a text, such as '0:12 what is moving?'")
        hours, minutes, seconds, text = found.groups()
        return cls(3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds), text.strip())


@dataclass(frozen=True)
class Spoken:
    """A text of the model at its time.

    Attributes:
        time_s: of the frame after which it was spoken, seconds.
        frame: index of that frame; -1: before the first.
        text: its words.
        question: the question it answers; None: it spoke unasked.
    """

    time_s: float
    frame: int
    text: str
    question: str | None = None


@dataclass
class Watched:
    """Results of playing a video.

    Attributes:
        spoken: in order.
        times_s: of the frames watched.
        kept: by frame that is pictured, by block: which of its vision tokens were processed (BoolTensor [N]).
        latencies_s: of each chunk of frames: seconds from its features to the end of its texts.
        encode_s: seconds per frame of the vision tower.
        behind_s: most seconds that a chunk had to wait because those before it took too long, in real time.
        stored_bytes, reserved_bytes: most bytes of keys and values, and of the buffers they lie in.
        wall_s: from the first to the last frame.
        tokens: length of the stream.
        stopped: why it ended before the video, if it did.
    """

    spoken: list[Spoken] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)
    behind_s: float = 0.0
    stored_bytes: int = 0
    reserved_bytes: int = 0
    wall_s: float = 0.0
    tokens: int = 0
    stopped: str | None = None

    def summary(self) -> dict[str, Any]:
        """The figures, JSON-ready; milliseconds per chunk of frames, and per frame of the vision tower."""
        frames = len(self.times_s)
        latency, encode = (
            {f"p{q}": round(1000 * float(np.percentile(values, q)), 2) for q in (50, 95, 99)} if values else {}
            for values in (self.latencies_s, self.encode_s)
        )
        return {
            "frames": frames,
            "tokens": self.tokens,
            "texts": len(self.spoken),
            "seconds": round(self.wall_s, 3),
            "frames_per_second": round(frames / self.wall_s, 2) if self.wall_s else None,
            "latency_ms": latency,
            "vision_tower_ms": encode,
            "behind_s": round(self.behind_s, 3),
            "kv_bytes": self.stored_bytes,
            "kv_reserved_bytes": self.reserved_bytes,
            "stopped": self.stopped,
        }


def place_questions(questions: Iterable[Question], times_s: np.ndarray, end_s: float) -> dict[int, list[Question]]:
    """The questions by the frame that is shown at their time, in the order given.

    Args:
        questions: any.
        times_s: [F] of the frames.
        end_s: length of the video, seconds.

    Raises:
        ValueError: one is asked after the end.
    """
    placed: dict[int, list[Question]] = {}
    for question in questions:
        if question.time_s >= end_s:
            raise ValueError(
                f"question {question.text!r} is asked at {question.time_s:g} s, the video ends at {end_s:g} s"
            )
        frame = max(int(np.searchsorted(times_s, question.time_s, side="right")) - 1, 0)
        placed.setdefault(frame, []).append(question)
    return placed


class Player:
    """Plays one video to one stream.

    Args:
        engine: with one stream.
        tower: turns uint8 frames [F, 3, H, W] into features [F, N, C].
        tokens: of the run's tokenizer.
        realtime: wait for each frame until its time has come.
        say: called with each text as soon as it is spoken.
        see: called with the index and picture [H, W, 3] of each frame that is pictured.
        every: draw every n-th frame; 0: none, and nothing is traced.
    """

    def __init__(
        self,
        engine: StreamEngine,
        tower: Callable[[Tensor], Tensor],
        tokens: StreamTokens,
        realtime: bool = False,
        say: Callable[[Spoken], None] = lambda spoken: None,
        see: Callable[[int, np.ndarray], None] = lambda index, frame: None,
        every: int = 1,
    ) -> None:
        self.engine, self.tower, self.tokens = engine, tower, tokens
        self.realtime, self.say, self.see, self.every = realtime, say, see, every
        self.watched = Watched()
        self._times_s = np.zeros(0)
        self._asked: list[Question] = []
        # a continued stream counts on; frames and questions of this video are numbered from 0
        self._frames_before, self._asked_before = engine.frames_seen[0], engine.questions_asked[0]

    def play(
        self,
        chunks: Iterable[np.ndarray],
        times_s: np.ndarray,
        questions: Mapping[int, Sequence[Question]] | None = None,
    ) -> Watched:
        """Watch a video to its end, or until it is interrupted, breaks off or outgrows the model's range: what was
        watched until then is kept, and `stopped` says why.

        Args:
            chunks: uint8 [<= F, H, W, 3], all frames in order.
            times_s: [F] of each frame.
            questions: from `place_questions`.
        """
        begin, index, self._times_s = time.perf_counter(), 0, times_s
        try:
            with self._trace() as trace:
                for frames in _rechunked(chunks, self.engine.settings.chunk):
                    self._wait(begin, float(times_s[index + len(frames) - 1] - times_s[0]))
                    self._watch(index, frames, questions or {})
                    self._remember(trace)
                    for offset, frame in enumerate(frames):
                        if self._pictured(index + offset):
                            self.see(index + offset, frame)
                    index += len(frames)
                    self.watched.wall_s = time.perf_counter() - begin
        except KeyboardInterrupt:
            self.watched.stopped = f"interrupted after {self._seen} frames"
        except ValueError as error:
            self.watched.stopped = str(error)
        self.watched.times_s = times_s[: self._seen].tolist()
        self.watched.tokens = self.engine.cache.totals[0]
        return self.watched

    @property
    def _seen(self) -> int:
        """Frames of this video that the stream has watched."""
        return self.engine.frames_seen[0] - self._frames_before

    def _pictured(self, index: int) -> bool:
        return self.every > 0 and index % self.every == 0

    def _trace(self) -> AbstractContextManager[mmskip.Trace | None]:
        """A trace where tokens are routed and pictured; a model that no family knows has none."""
        llm = self.engine.model.llm
        return mmskip.trace(llm) if self.every and mmskip.applied(llm) else nullcontext()

    def _wait(self, begin: float, until_s: float) -> None:
        if self.realtime:
            early_s = begin + until_s - time.perf_counter()
            self.watched.behind_s = max(self.watched.behind_s, -early_s)
            time.sleep(max(0.0, early_s))

    def _watch(self, first: int, frames: np.ndarray, questions: Mapping[int, Sequence[Question]]) -> None:
        start = time.perf_counter()
        features = self.tower(torch.from_numpy(frames).permute(0, 3, 1, 2))
        if features.is_cuda:
            torch.cuda.synchronize(features.device)
        encoded = time.perf_counter()
        pushed = 0
        for index in range(len(frames)):
            for question in questions.get(first + index, ()):
                self.engine.push(features[pushed : index + 1])
                pushed = index + 1
                self._asked.append(question)
                self.engine.ask(self.tokens.question(question.text))
        self.engine.push(features[pushed:])
        while (said := self.engine.step()) is not None:
            for item in said:
                self._say(item)
        self.watched.encode_s.append((encoded - start) / len(frames))
        self.watched.latencies_s.append(time.perf_counter() - encoded)
        self.watched.stored_bytes = max(self.watched.stored_bytes, self.engine.cache.stored_bytes)
        self.watched.reserved_bytes = max(self.watched.reserved_bytes, self.engine.cache.reserved_bytes)

    def _say(self, item: StreamUtterance) -> None:
        frame, asked = max(item.frame - self._frames_before, -1), None
        if item.question is not None:
            number = item.question - self._asked_before
            asked = self._asked[number].text if number >= 0 else "(asked before this video)"
        spoken = Spoken(float(self._times_s[max(frame, 0)]), frame, self.tokens.decode(item.tokens), asked)
        self.watched.spoken.append(spoken)
        self.say(spoken)

    def _remember(self, trace: mmskip.Trace | None) -> None:
        """Keep which tokens ran, and nothing else: a trace of hours would not be bounded."""
        if trace is None:
            return
        if any(layer.kept is not None for forward in trace.forwards for layer in forward.layers):
            for site, kept in Selections.of(trace).kept.items():
                for (_, number), mask in kept.items():
                    frame = number - self._frames_before
                    if frame >= 0 and self._pictured(frame):
                        self.watched.kept.setdefault(frame, {})[site] = mask
        trace.forwards.clear()


def _rechunked(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the frames, `size` at a time."""
    waiting: list[np.ndarray] = []
    for chunk in chunks:
        for frame in chunk:
            waiting.append(frame)
            if len(waiting) == size:
                yield np.stack(waiting)
                waiting = []
    if waiting:
        yield np.stack(waiting)
