"""Pack a call of the model: the state of each stream, its part of the call, and the padded batch.

Shapes: B streams, T tokens of a call, N tokens per frame, C feature channels.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mmskip.hf.streaming.slot_ledger import TEXT_PIECE
from mmskip.models.video_llm.speaking import TokenIds
from mmskip.tokens.groups import TEXT


@dataclass
class Stream:
    """One stream on the host.

    Attributes:
        text: ids the model has not seen yet, before `opener`.
        opener: ids before the next frame: the silent token, or `\\n[`.
        opened: whether the last thing the model saw is a frame.
        frames: [N, C] each, not watched yet; `seen` were.
        questions: (number, frames to be watched before, ids).
        asked: questions so far.
        words: of the text being spoken; None: watching.
        answering: number of the question the text answers; None: the model speaks by itself.
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

    @property
    def question_due(self) -> bool:
        """Whether the next question is to be answered now."""
        return bool(self.questions) and self.questions[0][1] <= self.seen

    def question_text(self, ids: TokenIds) -> list[int]:
        """The next question with the text before it; it closes the stream part that is open."""
        close = [ids.speak] if self.opened else []
        return [*self.text, *close, *self.questions[0][2], *ids.assistant]


class Part(NamedTuple):
    """The part of a call that belongs to one stream: text, then frames with a silent token between them.

    Attributes:
        text: ids.
        frames: [N, C] each.
        then: what to do with the logits of the last token: "none" (more text follows), "decide" whether to speak at
            each frame, or "pick" the next word.
    """

    text: list[int]
    frames: list[Tensor]
    then: str


def piece(text: list[int], then: str, most: int = TEXT_PIECE) -> Part:
    """The first tokens of a text: a long one takes several calls, of lengths that do not depend on the chunk."""
    return Part(text[:most], [], then if len(text) <= most and then != "none" else "none")


def next_part(stream: Stream, ids: TokenIds, chunk: int) -> Part | None:
    """The next part of a stream, of at most `chunk` frames; None where it has nothing to do."""
    if stream.words is not None:
        return piece(stream.text, "pick")
    if stream.question_due:
        return piece(stream.question_text(ids), "pick")
    if not stream.frames:
        return None
    text = [*stream.text, *stream.opener]
    if len(text) > TEXT_PIECE:
        return piece(text, "none", TEXT_PIECE)
    most = chunk
    if stream.questions:
        most = min(most, stream.questions[0][1] - stream.seen)
    return Part(text, [frame for frame, _ in zip(stream.frames, range(most), strict=False)], "decide")


@dataclass(frozen=True)
class Packed:
    """The batch of one call, padded on the right.

    Attributes:
        input_ids: int [B, T].
        layout: int [B, T], the number of each vision token's frame in its stream; -1: text.
        lengths: tokens of each stream.
        frames: [N, C] each, of all streams in order.
        rows, cols: places whose logits are asked for.
    """

    input_ids: np.ndarray
    layout: np.ndarray
    lengths: list[int]
    frames: list[Tensor]
    rows: list[int]
    cols: list[int]


def pack(parts: Sequence[Part | None], seen: Sequence[int], silent: int, frame_tokens: int) -> Packed:
    """Put the parts of all streams into one batch.

    Args:
        parts: of each stream; None: it waits.
        seen: frames that each stream has watched.
        silent: id of the silent token.
        frame_tokens: N.
    """
    rows, cols = [], []
    lines: list[tuple[list[int], list[int]]] = []
    for number, part in enumerate(parts):
        line: list[int] = [] if part is None else list(part.text)
        layout = [TEXT] * len(line)
        for index, _ in enumerate(part.frames if part else ()):
            if index:
                line.append(silent)
                layout.append(TEXT)
            line += [0] * frame_tokens
            layout += [seen[number] + index] * frame_tokens
            rows.append(number)
            cols.append(len(line) - 1)
        if part is not None and part.then == "pick":
            rows.append(number)
            cols.append(len(line) - 1)
        lines.append((line, layout))
    lengths = [len(line) for line, _ in lines]
    width = max(lengths)
    return Packed(
        np.array([line + [0] * (width - len(line)) for line, _ in lines]),
        np.array([layout + [TEXT] * (width - len(layout)) for _, layout in lines]),
        lengths,
        [frame for part in parts if part is not None for frame in part.frames],
        rows,
        cols,
    )
