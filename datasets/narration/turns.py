"""From narrations to token sequences: the stream / assistant turns of a streaming video LLM.

Template of one sample (VideoLLM-online, arXiv 2406.11816; VideoLLM-MoD, arXiv 2408.16730):

    <bos>instruction\\n[FRAME,FRAME,...,FRAME]\\nAssistant: narration<eos>\\n[FRAME,...

FRAME is `frame_tokens` copies of the vision token `<v>`. The token after a frame is the decision made at the
frame's last vision token: `,` (stay silent) or `]` (speak now). The first frame of a sample opens the stream and
is never learned; it belongs to no turn.

Shapes: T tokens, F frames, N tokens per frame, C feature channels, B samples.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import LongTensor, Tensor

from mmskip.datasets.common.labels import IGNORE
from mmskip.datasets.narration.tokenizer import StreamTokens


@dataclass(frozen=True)
class Narration:
    """One narrated moment of a video.

    Attributes:
        time_s: seconds from the start of the video, >= 0.
        text: plain words, cleaned.
    """

    time_s: float
    text: str


class Turn(NamedTuple):
    """One stream part followed by one narration, before tokenization.

    Attributes:
        frames: frame index range [start, stop) of the video, at the sampling rate; start >= 1.
        narration: the text spoken after frame `stop - 1`.
        time_s: the narration's own time in seconds, before it was rounded up to the frame grid.
    """

    frames: tuple[int, int]
    narration: str
    time_s: float


class TurnSpan(NamedTuple):
    """Position of one turn in a token sequence. (A named tuple: Lightning moves batches that hold them.)

    Attributes:
        frames: frame index range [start, stop) of the stream part, counted in the sample's own frames.
        stream: token index of the last vision token of each of these frames; the label after each is learned.
        text: token index range [start, stop) of the narration with its eos, all of them labels.
        narration: the text as given.
        time_s: the narration's time in the video, seconds.
    """

    frames: tuple[int, int]
    stream: tuple[int, ...]
    text: tuple[int, int]
    narration: str
    time_s: float

    def shifted(self, by: int) -> "TurnSpan":
        """Shift the turn `by` tokens to the right (left padding)."""
        return self._replace(
            stream=tuple(index + by for index in self.stream), text=(self.text[0] + by, self.text[1] + by)
        )


def frame_index(time_s: float, fps: float) -> int:
    """Index of the first frame of the grid 0, 1/fps, 2/fps, ... at or after `time_s` seconds."""
    return math.ceil(time_s * fps - 1e-6)


def plan_turns(
    narrations: Iterable[Narration], fps: float, num_frames: int, min_words: int = 2
) -> tuple[list[Turn], Counter[str]]:
    """Turn the narrations of one video into turns on its frame grid.

    Times are rounded up to the grid (between the last frame and the end of the video: to the last frame); of several
    narrations on one frame the last is kept; consecutive duplicates and texts of fewer than `min_words` words are
    dropped. The frames after the last narration belong to no turn.

    Args:
        narrations: in any order; sorted here by time, stable.
        fps: sampling rate, frames per second, > 0.
        num_frames: number of sampled frames of the video, >= 1.
        min_words: shortest narration kept, words.

    Returns:
        The turns in order, and how many narrations were dropped, by reason: "too short", "past the end",
        "on the first frame", "same frame", "duplicate".

    Raises:
        ValueError: fps <= 0, num_frames < 1 or a negative time.
    """
    if not fps > 0 or num_frames < 1:
        raise ValueError(f"plan_turns needs fps > 0 and num_frames >= 1, got fps={fps}, num_frames={num_frames}")
    dropped: Counter[str] = Counter()
    by_frame: dict[int, Narration] = {}
    for item in sorted(narrations, key=lambda narration: narration.time_s):
        if item.time_s < 0:
            raise ValueError(f"narration at {item.time_s} s ({item.text!r}): times must be >= 0 s")
        index = frame_index(item.time_s, fps)
        if index > num_frames:
            dropped["past the end"] += 1
            continue
        index = min(index, num_frames - 1)
        if len(item.text.split()) < min_words:
            dropped["too short"] += 1
        elif index == 0:
            dropped["on the first frame"] += 1
        else:
            dropped["same frame"] += index in by_frame
            by_frame[index] = item
    turns: list[Turn] = []
    for index, item in by_frame.items():
        if turns and turns[-1].narration == item.text:
            dropped["duplicate"] += 1
            continue
        start = turns[-1].frames[1] if turns else 1
        turns.append(Turn((start, index + 1), item.text, item.time_s))
    return turns, +dropped


def split_turns(
    turns: Sequence[Turn],
    tokens: StreamTokens,
    frame_tokens: int,
    max_frames: int | None = None,
    max_tokens: int | None = None,
    instruction: str = "",
) -> tuple[list[list[Turn]], Counter[str]]:
    """Cut a long video into samples that fit, at the borders of turns.

    Each sample starts with one frame that is not learned: frame 0, or the last frame of the sample before it. A turn
    that does not fit alone loses its earliest frames ("shortened"); one whose text does not fit is dropped ("text too
    long").

    Args:
        turns: the turns of one video, from `plan_turns`.
        tokens: the tokenizer's stream tokens, to count text.
        frame_tokens: tokens per frame, N.
        max_frames: most frames of a sample, >= 2; None: no limit.
        max_tokens: most tokens of a sample; None: no limit.
        instruction: as given to `build_sample`.

    Returns:
        The turns of each sample, and counts of those shortened, dropped or cut off ("split": samples beyond the first).

    Raises:
        ValueError: a limit too small for one learned frame.
    """
    per_frame = frame_tokens + 1
    head = len(tokens.head(instruction)) + per_frame
    per_turn = len(tokens.open) + len(tokens.assistant)
    _check_limits(max_frames, max_tokens, frame_tokens, head + per_frame + per_turn + 2)
    most = _Size(math.inf if max_frames is None else max_frames, math.inf if max_tokens is None else max_tokens)
    counts: Counter[str] = Counter()
    samples: list[list[Turn]] = []
    used: _Size | None = None  # by the last sample; None: the next turn begins one
    for turn in turns:
        text = per_turn + len(tokens.narration(turn.narration))
        grown = None if used is None else used.plus(turn, per_frame, text)
        if grown is None or grown.frames > most.frames or grown.tokens > most.tokens:
            room = min(most.frames - 1, (most.tokens - head - text) // per_frame)
            if room < 1:
                counts["text too long"] += 1
                # The frames of a dropped turn are skipped, so the next turn cannot continue this sample.
                used = None
                continue
            if turn.frames[1] - turn.frames[0] > room:
                counts["shortened"] += 1
                turn = turn._replace(frames=(turn.frames[1] - int(room), turn.frames[1]))
            samples.append([])
            grown = _Size(1, head).plus(turn, per_frame, text)
        samples[-1].append(turn)
        used = grown
    counts["split"] = max(len(samples) - 1, 0)
    return samples, +counts


class _Size(NamedTuple):
    """Length of a sample in frames and tokens."""

    frames: float
    tokens: float

    def plus(self, turn: Turn, per_frame: int, text: int) -> "_Size":
        """Add a turn whose text takes `text` tokens."""
        frames = turn.frames[1] - turn.frames[0]
        return _Size(self.frames + frames, self.tokens + frames * per_frame + text)


def _check_limits(max_frames: int | None, max_tokens: int | None, frame_tokens: int, least: int) -> None:
    if max_frames is not None and max_frames < 2:
        raise ValueError(f"max_frames must be at least 2 (one frame is not learned), got {max_frames}")
    if max_tokens is not None and max_tokens < least:
        raise ValueError(
            f"max_tokens={max_tokens} leaves no room for one learned frame of {frame_tokens} tokens and its text; "
            f"give at least {least}"
        )


def build_sample(
    turns: Sequence[Turn],
    features: Tensor,
    tokens: StreamTokens,
    uid: str,
    first_frame: int = 0,
    instruction: str = "",
) -> dict[str, Any]:
    """Tokenize the turns of one video (or of one part of it) into a training sample.

    Args:
        turns: at least one, each starting where the one before it stopped; the first at `first_frame + 1`.
        features: [F, N, C] features of the frames `first_frame`, `first_frame + 1`, ...; frames after the last turn
            are not used.
        tokens: the tokenizer's stream tokens (`StreamTokens.of`).
        uid: name of the sample.
        first_frame: the video's frame that opens the sample (not learned).
        instruction: text put after `<bos>`.

    Returns:
        Dict with `input_ids`, `labels`, `layout` (LongTensor [T]; labels unshifted, -100 where not learned; layout is
        the frame index of a vision token and -1 on text), `features` [F, N, C], `turns` (list of `TurnSpan`), `uid`.

    Raises:
        ValueError: no turns, turns with gaps, or fewer features than frames.
    """
    if not turns:
        raise ValueError(f"sample {uid!r} has no turns; drop videos without narrations before build_sample")
    num_frames = turns[-1].frames[1] - first_frame
    if features.ndim != 3 or features.shape[0] < num_frames:
        raise ValueError(
            f"sample {uid!r} needs features [F >= {num_frames}, N, C], got {tuple(features.shape)}; "
            "encode the video again at the same fps"
        )
    writer, spans = _written(turns, tokens, features.shape[1], uid, first_frame, instruction)
    return {
        "input_ids": torch.tensor(writer.ids),
        "labels": torch.tensor(writer.labels),
        "layout": torch.tensor(writer.layout),
        "features": features[:num_frames],
        "turns": spans,
        "uid": uid,
    }


def _written(
    turns: Sequence[Turn], tokens: StreamTokens, frame_tokens: int, uid: str, first_frame: int, instruction: str
) -> tuple["_Writer", list[TurnSpan]]:
    """The token lists of a sample, and where its turns lie in them; see `build_sample`."""
    writer = _Writer(tokens, frame_tokens)
    writer.text(tokens.head(instruction))
    writer.text(tokens.open)
    writer.frame()
    spans: list[TurnSpan] = []
    next_frame = first_frame + 1
    for turn in turns:
        if turn.frames[0] != next_frame or turn.frames[1] <= next_frame:
            raise ValueError(f"sample {uid!r}: turn {turn} must start at frame {next_frame} and hold a frame")
        writer.text(tokens.open if spans else [tokens.silent])
        spans.append(writer.turn(turn, first_frame))
        next_frame = turn.frames[1]
    return writer, spans


class _Writer:
    """Appends text and frames to the three parallel token lists of a sample."""

    def __init__(self, tokens: StreamTokens, frame_tokens: int) -> None:
        self.tokens, self.frame_tokens = tokens, frame_tokens
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.layout: list[int] = []
        self.frames = 0

    def text(self, ids: Sequence[int], learn: bool = False) -> None:
        self.ids += ids
        self.labels += ids if learn else [IGNORE] * len(ids)
        self.layout += [-1] * len(ids)

    def turn(self, turn: Turn, first_frame: int) -> TurnSpan:
        """Append the frames of a turn and its text; returns where they lie."""
        tokens, stream = self.tokens, []
        for frame in range(*turn.frames):
            stream.append(self.frame())
            self.text([tokens.silent if frame + 1 < turn.frames[1] else tokens.speak], learn=True)
        self.text(tokens.assistant)
        start = len(self.ids)
        self.text(tokens.narration(turn.narration), learn=True)
        frames = (turn.frames[0] - first_frame, turn.frames[1] - first_frame)
        return TurnSpan(frames, tuple(stream), (start, len(self.ids)), turn.narration, turn.time_s)

    def frame(self) -> int:
        """Append one frame; returns the token index of its last vision token."""
        self.ids += [self.tokens.vision] * self.frame_tokens
        self.labels += [IGNORE] * self.frame_tokens
        self.layout += [self.frames] * self.frame_tokens
        self.frames += 1
        return len(self.ids) - 1


def collate_narration(
    samples: Sequence[dict[str, Any]], pad_token_id: int, padding_side: str = "right"
) -> dict[str, Any]:
    """Pad samples to one batch.

    Args:
        samples: from `build_sample`, B of them.
        pad_token_id: fills `input_ids`.
        padding_side: "right" or "left".

    Returns:
        `input_ids`, `attention_mask`, `labels`, `layout`: LongTensor [B, T_max] (padding: pad_token_id, 0, -100, -1);
        `features` [sum of F, N, C], rows in batch order, so that the vision positions of the batch read row by row are
        `features.flatten(0, 1)`; `turns` (list per sample, token indices in the padded row); `uid`.

    Raises:
        ValueError: no samples, or another padding side.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
    if not samples:
        raise ValueError("collate_narration needs at least one sample, got none")
    longest = max(len(sample["input_ids"]) for sample in samples)
    fills = {"input_ids": pad_token_id, "labels": IGNORE, "layout": -1}
    batch: dict[str, Any] = {
        key: torch.full((len(samples), longest), fill, dtype=torch.long) for key, fill in fills.items()
    }
    mask: LongTensor = torch.zeros(len(samples), longest, dtype=torch.long)  # type: ignore[assignment]
    turns = []
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        offset = longest - length if padding_side == "left" else 0
        for key in fills:
            batch[key][row, offset : offset + length] = sample[key]
        mask[row, offset : offset + length] = 1
        turns.append([span.shifted(offset) for span in sample["turns"]])
    batch["attention_mask"] = mask
    batch["features"] = torch.cat([sample["features"] for sample in samples])
    batch["turns"] = turns
    batch["uid"] = [sample["uid"] for sample in samples]
    return batch
