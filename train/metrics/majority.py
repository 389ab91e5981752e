"""Majority baselines: the most frequent training answers, without a look at the pictures or videos."""

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmskip.models.video_llm.metrics import TurnScore, appended_frames, correct_prefix


def majority_accuracy(train: Iterable[tuple[Hashable, str]], test: Iterable[tuple[Hashable, str]]) -> float:
    """Share of the test answers that equal the most frequent training answer to the same question, in [0, 1].

    A question that is not in the training set counts as wrong; no test answers give 0.

    Args:
        train: pairs of a question and its answer.
        test: the same.
    """
    answers: dict[Hashable, Counter[str]] = {}
    for question, answer in train:
        answers.setdefault(question, Counter())[answer] += 1
    best = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    right = [question in best and best[question] == answer for question, answer in test]
    return sum(right) / max(1, len(right))


def blind_baseline(root: Path, split: str = "val") -> float:
    """Majority accuracy of a folder of conversations (`train.jsonl` and `{split}.jsonl`)."""
    return majority_accuracy(_conversations(root / "train.jsonl"), _conversations(root / f"{split}.jsonl"))


def _conversations(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            yield asked["content"][-1]["text"], answered["content"][0]["text"]


class MajorityBaseline:
    """Speaks after the most frequent number of frames, and says at each place of a narration its most frequent token.

    Probabilities are the frequencies of the tokens at a place, with one added to each token of the vocabulary.

    Args:
        vocab_size: number of tokens, for the probabilities.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._gaps: Counter[int] = Counter()
        self._places: list[Counter[int]] = []

    def fit(self, frames: int, tokens: Iterable[int]) -> None:
        """Count one training turn: its number of frames and the ids of its text with eos."""
        self._gaps[frames] += 1
        for place, token in enumerate(tokens):
            if place == len(self._places):
                self._places.append(Counter())
            self._places[place][token] += 1

    def score(self, turns: Sequence[tuple[int, Sequence[int]]]) -> list[TurnScore]:
        """Score the turns (frames, text ids) of one sample as a model is scored.

        Raises:
            ValueError: nothing was fitted.
        """
        if not self._gaps:
            raise ValueError("the majority baseline has seen no training turn; call fit first")
        gap = self._gaps.most_common(1)[0][0]
        scores = []
        for index, (frames, tokens) in enumerate(turns):
            following = turns[index + 1][0] if index + 1 < len(turns) else None
            scores.append(
                TurnScore(
                    nll=math.fsum(-math.log(self._probability(i, token)) for i, token in enumerate(tokens)),
                    correct=correct_prefix([self._best(i) == token for i, token in enumerate(tokens)]),
                    text_tokens=len(tokens),
                    stream_tokens=frames,
                    frame_diff=_difference(gap, frames, following),
                )
            )
        return scores

    def _probability(self, place: int, token: int) -> float:
        counts = self._places[place] if place < len(self._places) else Counter()
        return (counts[token] + 1) / (counts.total() + self.vocab_size)

    def _best(self, place: int) -> int | None:
        return self._places[place].most_common(1)[0][0] if place < len(self._places) else None

    def state_dict(self) -> dict[str, Any]:
        """The counts as plain dicts and lists."""
        return {"gaps": dict(self._gaps), "places": [dict(place) for place in self._places]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._gaps = Counter(state["gaps"])
        self._places = [Counter(place) for place in state["places"]]


def _difference(gap: int, frames: int, following: int | None) -> int:
    """frame_diff of a narrator that speaks at the `gap`-th frame of a turn of `frames`."""
    if gap <= frames:
        return frames - gap
    if following is None:
        return 0
    return -min(gap - frames, max(appended_frames(frames, following), 0))
