"""Search along one setting, from coarse to fine."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmskip.utils.results import ResumableResults

_DIGITS = 4  # values that agree to this many digits are one value


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        best: value with the lowest score.
        score: its score.
        scores: of all values tried, by value.
    """

    best: float
    score: float
    scores: dict[float, float]


def search(
    evaluate: Callable[[float], float],
    low: float,
    high: float,
    points: int = 5,
    rounds: int = 3,
    also: Sequence[float] = (),
    file: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Found:
    """Find the value with the lowest score.

    The first round tries `points` even values from `low` to `high`; every further round tries the middles between the
    best value and its neighbours. A score with one valley is found to (high - low) / (points - 1) / 2^(rounds - 1).

    Args:
        evaluate: value -> score, lower is better; deterministic.
        low, high: range of the values, low < high.
        points: values of the first round, >= 3.
        rounds: >= 1.
        also: further values to try first, such as the one that changes nothing; they may win.
        file: JSON file that every score is written to as soon as it is known; a search continues where its file ends.
        settings: what the scores depend on, JSON-ready; kept in `file`, and compared with those of a file found.

    Raises:
        ValueError: arguments out of range, a score that is not finite, or a file of another search.
    """
    if not low < high or points < 3 or rounds < 1:
        raise ValueError(
            f"(low, high) is {(low, high)}, points {points}, rounds {rounds}; expected low < high, points >= 3, "
            "rounds >= 1."
        )
    results = None if file is None else ResumableResults(file, settings or {})
    scores = {} if results is None else _scores(results)

    def score(value: float) -> None:
        value = round(value, _DIGITS)
        if value in scores:
            return
        found = float(evaluate(value))
        if not math.isfinite(found):
            raise ValueError(f"the score of {value} is {found}; expected a finite number. Look at the range searched.")
        scores[value] = found
        if results is not None:
            results.put({"evaluated": [{"value": v, "score": s} for v, s in scores.items()]})

    for value in [*also, *(low + i * (high - low) / (points - 1) for i in range(points))]:
        score(value)
    for _ in range(rounds - 1):
        ordered = sorted(scores)
        place = ordered.index(_best(scores))
        for neighbour in ordered[max(place - 1, 0) : place] + ordered[place + 1 : place + 2]:
            score((ordered[place] + neighbour) / 2)
    best = _best(scores)
    return Found(best, scores[best], dict(sorted(scores.items())))


def _best(scores: dict[float, float]) -> float:
    return min(scores, key=lambda value: scores[value])


def _scores(results: ResumableResults) -> dict[float, float]:
    try:
        return {float(row["value"]): float(row["score"]) for row in results.values.get("evaluated", [])}
    except (KeyError, TypeError, ValueError) as error:
        raise results.unfit(error) from error
