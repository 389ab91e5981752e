"""Scores of a captioner over a validation: losses, right answers, and captions with their references."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmskip.models.captioner.metrics import score_captions


class ValidationScores:
    """Sums over the batches of one rank.

    Args:
        device: of the sums.

    Attributes:
        losses: summed cross-entropy and its labels, by task.
        right: right answers, and all of them.
        captions: caption and references by image.
    """

    def __init__(self, device: torch.device) -> None:
        self.losses = {task: torch.zeros(2, device=device, dtype=torch.float64) for task in ("caption", "entailment")}
        self.right = torch.zeros(2, device=device, dtype=torch.float64)
        self.captions: dict[str, tuple[str, tuple[str, ...]]] = {}

    def add_loss(self, task: str, loss: Tensor, labels: int) -> None:
        """Add the summed cross-entropy of some labels."""
        self.losses[task] += torch.stack([loss.double(), loss.new_tensor(labels).double()])

    def add_answers(self, right: Tensor) -> None:
        """Add answers, BoolTensor [R]."""
        self.right += torch.stack([right.sum(), right.new_tensor(len(right), dtype=torch.long)])

    def compute(self, reduce: Callable[[Tensor], Any]) -> dict[str, float]:
        """Average over all ranks; gathers `captions` of all ranks too.

        Args:
            reduce: sums a tensor over the ranks.
        """
        sums = reduce(torch.cat([*self.losses.values(), self.right])).tolist()
        caption, captions, pair, pairs, right, judged = sums
        self.captions = gathered(self.captions)
        found = {}
        if captions:
            found["caption_loss"] = caption / captions
        if pairs:
            found |= {"entailment_loss": pair / pairs, "accuracy": right / judged, "pairs": judged}
        if len(self.captions) > 1:
            scores = score_captions(
                {uid: text for uid, (text, _) in self.captions.items()},
                {uid: references for uid, (_, references) in self.captions.items()},
            )
            found |= {"cider": scores.totals["CIDEr"], "captions": float(len(self.captions))}
        return found


def gathered(captions: dict[str, Any]) -> dict[str, Any]:
    """Merge the captions of all ranks (a collective call when several ranks run)."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return captions
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, captions)
    return {uid: said for part in parts for uid, said in part.items()}
