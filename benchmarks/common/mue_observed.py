"""Candidate thresholds and exit layers of benchmarks/mue.py: scores at full depth, and where answers settle."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from mmskip.datasets.common.labels import IGNORE
from mmskip.exits.criteria import SampleScores, TokenScores
from mmskip.hf.exits.heads import exit_head
from mmskip.models.captioner.module import Captioner
from mmskip.train.evaluation.captioner.task import Batch, encoded

QUANTILES = {
    "image": (0.0, 0.3),
    "text": (0.0, 0.3),
    "saturation": (0.02, 0.1, 0.2, 0.35, 0.5, 0.7),
    "entropy": (0.02, 0.1, 0.2, 0.35, 0.5, 0.7),
}
POINTS = (1, 2, 3)
"""After how many layers of the decoder an exit is possible, where it is not every one: each costs a score."""
SCORE = 0.15
"""Assumed cost of a score when exit layers are chosen, in layers."""


@dataclass
class Observed:
    """Scores and answers of the validation texts at full depth.

    Attributes:
        scores: `image`, `text`: saturations in the encoder; `saturation`, `entropy`: of the answers' tokens after each
            decoder layer but the last.
        settled: of each of these tokens the first decoder layer from which on the head gives its final answer.
    """

    scores: dict[str, list[list[float]]]
    settled: list[int]

    def thresholds(self, part: str, points: Sequence[int] | None = None, most: int | None = None) -> list[float]:
        """Thresholds that differ in the exits after some layers (None: all below `most`), and one that never
        fires."""
        layers = self.scores[part][: None if most is None else max(most - 1, 1)]
        taken = [value for number, values in enumerate(layers, 1) if points is None or number in points
                 for value in values]  # fmt: skip
        found = torch.tensor(taken).quantile(torch.tensor(QUANTILES[part])).tolist()
        return sorted({max(min(round(value - 1e-5, 5), 1.0), 0.0) for value in (*found, 1.0001)})

    def separation(self, criterion: str) -> list[float | None]:
        """By decoder layer the probability that a settled token scores above one that is not (0.5: the score says
        nothing, below: the opposite); None where there are fewer than four of either."""
        settled, found = torch.tensor(self.settled), []
        for layer, values in enumerate(self.scores[criterion], 1):
            scores = torch.tensor(values)
            done, open_ = scores[settled <= layer], scores[settled > layer]
            enough = min(len(done), len(open_)) > 3
            found.append((done[:, None] > open_).float().mean().item() if enough else None)
        return found

    def points(self, most: int, lag: int) -> list[tuple[int, ...] | None]:
        """Sets of exit points below layer `most`, greedily those by which the fewest layers would run if every token
        left at the first point at which it is settled for `lag` layers; and every layer."""
        found: list[tuple[int, ...] | None] = [None]
        chosen: tuple[int, ...] = ()
        for size in range(1, min(max(POINTS), most - 1) + 1):
            others = [tuple(sorted((*chosen, point))) for point in range(1, most) if point not in chosen]
            chosen = min(others, key=lambda points: sum(_ideal(layer + lag, points, most) for layer in self.settled))
            if size in POINTS:
                found.append(chosen)
        return found


def _ideal(settled: int, points: Sequence[int], most: int) -> float:
    """Layers, scores among them, of a token that exits at the first point at which it is settled."""
    passed = [point for point in points if point < settled]
    left = next((point for point in points if point >= settled), most)
    return left + SCORE * min(len(passed) + 1, len(points))


@contextmanager
def _states(blocks: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Collect, for every run of the blocks, the states before the first block and after each."""
    runs: list[list[Tensor]] = []
    keep = blocks[0].register_forward_pre_hook(lambda _, given: runs.append([given[0]]))
    others = [block.register_forward_hook(lambda _, given, output: runs[-1].append(output)) for block in blocks]
    try:
        yield runs
    finally:
        for handle in (keep, *others):
            handle.remove()


@torch.no_grad()
def observed(model: Captioner, batches: Sequence[Batch], task: str) -> Observed:
    """See `Observed`."""
    encoder, decoder = len(model.view.encoder), len(model.view.decoder)
    found: dict[str, list[list[float]]] = {part: [[] for _ in range(encoder - 1)] for part in ("image", "text")}
    found |= {criterion: [[] for _ in range(decoder - 1)] for criterion in ("saturation", "entropy")}
    settled: list[int] = []
    for batch in batches:
        texts = batch[task]
        with _states(model.view.encoder) as runs:
            inside = encoded(model, batch, texts)
        for name, states, real in zip(("image", "text"), runs, (None, texts.prompt_mask.bool()), strict=True):
            sample = SampleScores("saturation", real)
            for layer, (before, after) in zip(found[name], pairwise(states), strict=False):
                layer += sample(after, before).tolist()
        with _states(model.view.decoder) as runs:
            logits, _ = model.layer_logits(*inside, texts.labels, list(range(1, decoder + 1)))
        at = texts.labels != IGNORE
        first = torch.zeros_like(at)
        first[:, 0] = True
        asked = (at & first)[at] if task == "entailment" else at[at]  # of a verdict the word, not its end
        for criterion in ("saturation", "entropy"):
            token = TokenScores(criterion, exit_head(model.view))
            for layer, (before, after) in zip(found[criterion], pairwise(runs[0]), strict=False):
                layer += token(after, before)[at][asked].tolist()
        said = torch.stack([of.argmax(-1)[asked] for of in logits])
        differs = (said != said[-1]).long() * torch.arange(1, decoder + 1)[:, None]
        settled += (differs.amax(0) + 1).tolist()
    return Observed(found, settled)
