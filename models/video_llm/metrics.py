"""The four metrics of streaming narration, as VideoLLM-online defines them (arXiv 2406.11816; the facts of
VideoLLM-MoD, arXiv 2408.16730, use the same).

Each is computed per turn, averaged over the turns of a sample, then over samples.

| metric | per turn |
|---|---|
| LM-PPL | exp(mean cross-entropy of the turn's text), teacher-forced; lower is better |
| LM-Correctness | length of the correct argmax prefix / number of text tokens; higher is better |
| TimeDiff | abs(frame_diff) / fps, seconds; lower is better |
| Fluency | share of the turn's tokens handled right up to the first mistake; higher is better |
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class TurnScore:
    """The counts one turn is scored by.

    Attributes:
        nll: summed cross-entropy of the turn's text tokens, nats.
        correct: length of the correct argmax prefix of the text, tokens.
        text_tokens: number of text tokens, eos included; 0 if the turn has no text.
        stream_tokens: number of learned stream decisions (one per frame).
        frame_diff: frames spoken too early (> 0) or too late (< 0).
    """

    nll: float
    correct: int
    text_tokens: int
    stream_tokens: int
    frame_diff: int

    @property
    def fluency(self) -> float:
        """Share of the turn's decisions and words before the first mistake, in [0, 1]."""
        total = self.stream_tokens + self.text_tokens
        if self.frame_diff == 0:
            return (self.stream_tokens + self.correct) / total
        if self.frame_diff > 0:
            return (self.stream_tokens - self.frame_diff) / total
        return (self.stream_tokens - 1) / total


def correct_prefix(right: Sequence[bool]) -> int:
    """Number of tokens before the first wrong one."""
    return next((index for index, ok in enumerate(right) if not ok), len(right))


def frame_diff(speaks: Sequence[bool], later: Sequence[bool]) -> int:
    """Frames between the moment the model would have spoken and the end of the turn.

    Args:
        speaks: for each frame of the turn, whether the model would speak there (teacher-forced).
        later: the same for the frames appended after the turn; empty for the last turn of a sample. Only asked
            when the model never spoke in the turn.

    Returns:
        > 0: so many frames early; 0: on time, or nothing could be appended; < 0: so many frames late, and
        -len(later) if the model did not speak at all.
    """
    if any(speaks):
        return len(speaks) - speaks.index(True) - 1
    if any(later):
        return -(later.index(True) + 1)
    return -len(later)


def appended_frames(turn_frames: int, next_frames: int) -> int:
    """Number of frames of the next turn to append to a turn in which the model stayed silent: at most as many as on
    its other side, so that early and late count alike."""
    return min(next_frames, turn_frames - 1)


class NarrationMetrics:
    """Collects scored samples and averages them; the same numbers at every batch size and number of ranks."""

    def __init__(self) -> None:
        self._samples: dict[Hashable, list[TurnScore]] = {}

    def reset(self) -> None:
        """Forget everything."""
        self._samples = {}

    def update(self, sample: Hashable, turns: Sequence[TurnScore]) -> None:
        """Add one sample. `sample` identifies it: a distributed sampler repeats samples to fill the last ranks, and a
        sample given twice counts once. A sample without turns says nothing and is left out."""
        if turns:
            self._samples[sample] = list(turns)

    def gathered(self) -> dict[Hashable, list[TurnScore]]:
        """The scored samples of all ranks (a collective call when several ranks run)."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return self._samples
        parts: list[dict[Hashable, list[TurnScore]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, self._samples)
        return {key: turns for part in parts for key, turns in part.items()}

    def compute(self, fps: float) -> dict[str, float]:
        """The means over all samples of all ranks (a collective call when several ranks run).

        Args:
            fps: frames per second of the sampled video, > 0.

        Returns:
            `lm_ppl`, `lm_correctness`, `time_diff` (seconds), `fluency` (NaN if no turn allows them),
            `samples` and `turns` counted.
        """
        return averages(self.gathered().values(), fps)


def averages(samples: Iterable[Sequence[TurnScore]], fps: float) -> dict[str, float]:
    """The means over the turns of each sample, and then over samples; see `NarrationMetrics.compute`."""
    scored = list(samples)
    spoken = [[turn for turn in turns if turn.text_tokens] for turns in scored]
    streamed = [[turn for turn in turns if turn.stream_tokens] for turns in scored]
    both = [[turn for turn in turns if turn.text_tokens and turn.stream_tokens] for turns in scored]
    return {
        "lm_ppl": _mean([_mean([_exp(turn.nll / turn.text_tokens) for turn in turns]) for turns in spoken]),
        "lm_correctness": _mean([_mean([t.correct / t.text_tokens for t in turns]) for turns in spoken]),
        "time_diff": _mean([_mean([abs(t.frame_diff) / fps for t in turns]) for turns in streamed]),
        "fluency": _mean([_mean([turn.fluency for turn in turns]) for turns in both]),
        "samples": float(len(scored)),
        "turns": float(sum(map(len, scored))),
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _exp(value: float) -> float:
    """exp, with infinity where it overflows: an untrained model may be that wrong."""
    return math.exp(value) if value < 700 else math.inf
