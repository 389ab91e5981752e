"""Loss on the embedded set's narrations by kind of word, to see which words a model has learned."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch.nn import functional as F

from mmskip.datasets.synthetic.world import COLOURS, DIRECTIONS, SHAPES, SIDES, SIZES
from mmskip.models.common.positions import Positions

VERBS = ("enters", "leaves", "moves", "hits", "hides", "comes")


def word_kinds(text: str) -> list[str]:
    """The kind of each word of a generated narration, and of the end after it.

    `colour` and `shape` are those of the acting object, `other colour` and `other shape` those of the object it hits;
    `again` is that word or the end of the sentence, which earlier events decide.
    """
    kinds: list[str] = []
    for index, word in enumerate(text.split()):
        other = "other " if "verb" in kinds else ""
        if index == 0:
            kinds.append("article")
        elif word in SIZES:
            kinds.append("size")
        elif word in COLOURS:
            kinds.append(f"{other}colour")
        elif word in SHAPES:
            kinds.append(f"{other}shape")
        elif word in VERBS:
            kinds.append("verb")
        elif word in SIDES or word in DIRECTIONS:
            kinds.append("direction")
        else:
            kinds.append("again" if word == "again" else "fixed")
    return [*kinds, "again"]


@torch.no_grad()
def word_losses(model: Any, loader: Any) -> dict[str, float]:
    """Mean cross-entropy in nats by kind of word, teacher-forced, over the narrations of a loader.

    Args:
        model: a `VideoLLM`.
        loader: of batches of `collate_narration` with one token per word.
    """
    losses = defaultdict(list)
    model.eval()
    for batch in loader:
        batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        positions = Positions.of(batch["labels"], batch["layout"])
        logits = model(batch, positions.rows, positions.cols).float()
        nll_BT = torch.zeros(batch["labels"].shape, device=logits.device)
        nll_BT[positions.rows, positions.cols + 1] = F.cross_entropy(logits, positions.labels, reduction="none")
        for nll_T, turns in zip(nll_BT.tolist(), batch["turns"], strict=True):
            for turn in turns:
                words = nll_T[turn.text[0] : turn.text[1]]
                for kind, nll in zip(word_kinds(turn.narration), words, strict=True):
                    losses[kind].append(nll)
    return {kind: math.fsum(values) / len(values) for kind, values in sorted(losses.items())}
