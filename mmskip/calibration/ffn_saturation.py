"""Find the threshold of FFN skipping on calibration data.

Shape suffixes: L blocks, N tokens.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmskip import families
from mmskip.importance_table import fingerprint
from mmskip.methods.ffn_skip import FFNSkipConfig, warm_blocks
from mmskip.registry import applied

_LEAST_RISE = 0.5
"""Rank correlation of the mean cosine with depth below which a model does not saturate."""


def ffn_threshold(
    model: nn.Module,
    data: Iterable[Any],
    share: float = 0.25,
    cold_first: int = 1,
    cold_last: int = 1,
    warmup: int = 0,
) -> FFNSkipConfig:
    """Find the threshold that skips `share` of the feed-forwards between the cold blocks on `data`.

    Args:
        model: a transformers decoder without methods.
        data: batches of ids [B, T], or dictionaries with `input_ids` and `attention_mask`.
        share: in (0, 1); the paper's useful range ends at 0.25 to 0.3.
        cold_first, cold_last, warmup: as in `FFNSkipConfig`.

    Returns:
        The config with that threshold, for this model.

    Raises:
        ValueError: the cosine does not rise through the stack (no saturation), no threshold skips as much, or the
            blocks are not built as a residual with a feed-forward added last.
    """
    from mmskip.hf.probes.residuals import mlp_cosines

    if not 0 < share < 1:
        raise ValueError(f"share is {share!r}; expected a number in (0, 1).")
    view = families.find(model, ("decoder",))
    if applied(model):
        raise ValueError(f"calibration needs the untouched model, but it carries {applied(model)}; remove_ that.")
    chosen = warm_blocks(len(view.blocks), cold_first, cold_last)
    cosines_LN = mlp_cosines(view, model, data, chosen, warmup)
    means = cosines_LN.mean(1)
    rise = _spearman(means)
    if rise < _LEAST_RISE:
        raise ValueError(
            f"no saturation: over blocks {chosen.start} to {chosen.stop - 1} the mean cosine between the state "
            f"before and after the feed-forward does not rise ({', '.join(f'{v:.3f}' for v in means.tolist())}; "
            f"rank correlation with depth {rise:.2f}, needed {_LEAST_RISE}). FFN skipping does not fit this model."
        )
    return FFNSkipConfig(_threshold(cosines_LN, share), cold_first, cold_last, warmup, fingerprint(view))


def _spearman(values: Tensor) -> float:
    """Return the rank correlation of values with their place."""
    ranks = values.argsort().argsort().double()
    places = torch.arange(len(values), dtype=torch.double)
    return float(torch.corrcoef(torch.stack([ranks, places]))[0, 1])


def skipped_share(cosines_LN: Tensor, threshold: float) -> float:
    """Return the share of the feed-forwards that a threshold skips: those after the first block that reaches it."""
    reached_LN = (cosines_LN >= threshold).cumsum(0) > 0
    return float(reached_LN[:-1].float().sum() / reached_LN.numel())


def _threshold(cosines_LN: Tensor, share: float) -> float:
    """Find the threshold whose share is nearest to the one asked for."""
    candidates = torch.quantile(cosines_LN.flatten().float(), torch.linspace(0, 1, 201)).tolist()
    best = min(candidates, key=lambda value: abs(skipped_share(cosines_LN, value) - share))
    found = skipped_share(cosines_LN, best)
    if abs(found - share) > 0.1:
        raise ValueError(f"no threshold skips {share:.0%} of the feed-forwards; the nearest skips {found:.0%}.")
    return min(float(best), 1.0)
