"""The labelled positions of a batch of token sequences.

Shapes: B samples, T tokens, P labelled positions.
"""

from dataclasses import dataclass

from torch import Tensor

from mmskip.datasets.common.labels import IGNORE


@dataclass(frozen=True)
class Positions:
    """The labelled positions of a batch.

    Attributes:
        rows: LongTensor [P], row in the batch.
        cols: LongTensor [P], index of the token that *predicts*; the label is that of the next token.
        labels: LongTensor [P], the token to predict.
        stream: BoolTensor [P], whether the predicting token is a vision token (the decision silent or speak).
    """

    rows: Tensor
    cols: Tensor
    labels: Tensor
    stream: Tensor

    @classmethod
    def of(cls, labels: Tensor, layout: Tensor) -> "Positions":
        """Positions of unshifted `labels` [B, T] (-100: not learned), with `layout` [B, T] (-1: text)."""
        rows, cols = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        return cls(rows, cols, labels[rows, cols + 1], layout[rows, cols] >= 0)
