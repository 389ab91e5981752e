"""The loss of a streaming video LLM: what to say (LM) and when to stay silent (stream).

Shapes: B samples, T tokens, P labelled positions of the batch, V vocabulary.
"""

from torch import Tensor, stack
from torch.nn import functional as F

from mmskip.models.common.positions import Positions


def loss_sums(logits: Tensor, positions: Positions, stream_weight: float) -> Tensor:
    """Sums, not means: the divisor of a mean is only known at the end of an optimizer step.

    Args:
        logits: [P, V].
        positions: the labelled positions the logits belong to.
        stream_weight: factor on the cross-entropy of stream labels, >= 0.

    Returns:
        FloatTensor [5] in fp32: weighted cross-entropy (the differentiable one), LM cross-entropy, stream
        cross-entropy, number of LM labels, number of stream labels.
    """
    nll = F.cross_entropy(logits.float(), positions.labels, reduction="none")
    stream = positions.stream
    lm_sum, stream_sum = nll[~stream].sum(), nll[stream].sum()
    stream_count = stream.sum().to(nll.dtype)
    weighted = lm_sum + stream_weight * stream_sum
    return stack([weighted, lm_sum.detach(), stream_sum.detach(), stream.numel() - stream_count, stream_count])
