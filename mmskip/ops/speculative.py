"""Which drafts are accepted, so that the output is what the target model alone would have given.

Shape suffixes: V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def matching(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafts in front agree with the target's own choices: greedy acceptance."""
    for count, (draft, own) in enumerate(zip(drafts, chosen, strict=False)):
        if draft != own:
            return count
    return len(drafts)


def speculative_sample(
    drafts: Sequence[int], draft_probs: Sequence[Tensor], target_probs: Sequence[Tensor]
) -> list[int]:
    """Speculative sampling (arXiv 2302.01318, 2211.17192): tokens distributed as the target alone would draw them.

    Args:
        drafts: tokens drawn from `draft_probs`, one each.
        draft_probs: distributions [V] the drafts were drawn from.
        target_probs: distributions [V] of the target at the same places, and one more after the last draft.

    Returns:
        The accepted drafts and one more token: drawn from what the target has above the draft where one was rejected,
        from the target itself where none was.
    """
    tokens: list[int] = []
    for draft, q_V, p_V in zip(drafts, draft_probs, target_probs, strict=False):
        if float(torch.rand((), device=p_V.device) * q_V[draft]) < float(p_V[draft]):
            tokens.append(draft)
            continue
        rest_V = (p_V - q_V).clamp(min=0)
        # equal distributions reject nothing but by rounding
        rest_V = rest_V if float(rest_V.sum()) > 0 else p_V
        return [*tokens, int(torch.multinomial(rest_V, 1))]
    return [*tokens, int(torch.multinomial(target_probs[len(drafts)], 1))]
