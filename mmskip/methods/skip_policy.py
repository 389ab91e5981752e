"""Rules that leave out, token by token, what no longer changes a token.

FFN-SkipLLM (arXiv 2404.03865): the cosine between the state entering a feed-forward block and the state after its
residual rises through the middle of the stack; once it reaches a threshold, the feed-forwards of the following blocks
are left out for that token. Attention always runs, so keys and values are complete. The first and last blocks ("cold")
and the first tokens of a sequence (warm-up) always run. The paper gives no thresholds: they are calibrated.

LAC (arXiv 2505.14467): a block is a void for a token whose norm it lets grow by less than alpha times the range of the
growths at the blocks before; what it did to that token is taken back. The block has run by then, so this saves nothing:
it shows what the voids are worth. What saves time is the static set, `LayerPlanConfig.lac`.

Shape suffixes: B batch, T tokens, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mmskip import families
from mmskip.calibration.importance import LAC_ALPHA, fingerprint, lac_voids
from mmskip.config import MethodConfig, check_choice, check_count
from mmskip.protocols import BlockView
from mmskip.registry import applied, register
from mmskip.swap import Change

POLICIES = ("ffn_skip", "lac")


@dataclass(frozen=True)
class SkipPolicyConfig(MethodConfig):
    """What is left out per token. `"ffn_skip"` is made by `SkipPolicyConfig.calibrated(model, data)`.

    Args:
        policy: `"ffn_skip"`, or `"lac"` (per token and sample; saves nothing), for which `alpha` alone counts.
        threshold: cosine from which a token is saturated, in (-1, 1].
        cold_first: blocks at the start whose feed-forward always runs, and whose cosine is not asked, >= 0.
        cold_last: blocks at the end whose feed-forward always runs, >= 0.
        warmup: tokens at the start of each sequence whose feed-forwards always run, >= 0; padding does not count.
        made_for: the architecture it was calibrated on.
        alpha: share of the range of growths below which a block is a void, >= 0; 0.8 as published.
    """

    policy: str = "ffn_skip"
    threshold: float = 1.0
    cold_first: int = 1
    cold_last: int = 1
    warmup: int = 0
    made_for: str = ""
    alpha: float = LAC_ALPHA

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, POLICIES)
        value = self.threshold
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1 < value <= 1:
            raise ValueError(f"threshold is {value!r}; expected a cosine in (-1, 1].")
        for name in ("cold_first", "cold_last", "warmup"):
            check_count(name, getattr(self, name))
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not self.alpha >= 0:
            raise ValueError(f"alpha is {self.alpha!r}; expected a number >= 0.")

    @classmethod
    def calibrated(
        cls,
        model: nn.Module,
        data: Iterable[Any],
        share: float = 0.25,
        cold_first: int = 1,
        cold_last: int = 1,
        warmup: int = 0,
    ) -> Self:
        """The config whose threshold leaves out `share` of the feed-forwards between the cold blocks on `data`.

        Args:
            model: a transformers decoder that nothing is applied to.
            data: batches of ids [B, T], or dictionaries with `input_ids` and `attention_mask`.
            share: in (0, 1); the paper's useful range ends at 0.25 to 0.3.

        Raises:
            ValueError: the cosine does not rise through the stack (no saturation), no threshold leaves out as much, or
                the blocks are not built as a residual with a feed-forward added last.
        """
        from mmskip.hf.probes.residuals import mlp_cosines

        if not 0 < share < 1:
            raise ValueError(f"share is {share!r}; expected a number in (0, 1).")
        view = families.find(model, ("decoder",))
        if applied(model):
            raise ValueError(f"calibration needs the untouched model, but it carries {applied(model)}; remove_ that.")
        chosen = _chosen(len(view.blocks), cold_first, cold_last)
        cosines_LN = mlp_cosines(view, model, data, chosen, warmup)
        means = cosines_LN.mean(1)
        rise = _spearman(means)
        if rise < 0.5:
            raise ValueError(
                f"no saturation: over blocks {chosen.start} to {chosen.stop - 1} the mean cosine between the state "
                f"before and after the feed-forward does not rise ({', '.join(f'{v:.3f}' for v in means.tolist())}; "
                f"rank correlation with depth {rise:.2f}, needed 0.5). This policy does not fit this model."
            )
        threshold = _threshold(cosines_LN, share)
        return cls("ffn_skip", threshold, cold_first, cold_last, warmup, fingerprint(view))


def _chosen(count: int, cold_first: int, cold_last: int) -> range:
    if count - cold_first - cold_last < 2:
        raise ValueError(
            f"cold_first={cold_first} and cold_last={cold_last} leave {max(count - cold_first - cold_last, 0)} of "
            f"{count} blocks; the policy needs two."
        )
    return range(cold_first, count - cold_last)


def _spearman(values: Tensor) -> float:
    """Rank correlation of values with their place."""
    ranks = values.argsort().argsort().double()
    places = torch.arange(len(values), dtype=torch.double)
    return float(torch.corrcoef(torch.stack([ranks, places]))[0, 1])


def left_out(cosines_LN: Tensor, threshold: float) -> float:
    """Share of the feed-forwards that a threshold leaves out: those after the first block that reaches it."""
    reached_LN = (cosines_LN >= threshold).cumsum(0) > 0
    return float(reached_LN[:-1].float().sum() / reached_LN.numel())


def _threshold(cosines_LN: Tensor, share: float) -> float:
    """The threshold whose share is nearest to the one asked for."""
    candidates = torch.quantile(cosines_LN.flatten().float(), torch.linspace(0, 1, 201)).tolist()
    best = min(candidates, key=lambda value: abs(left_out(cosines_LN, value) - share))
    found = left_out(cosines_LN, best)
    if abs(found - share) > 0.1:
        raise ValueError(f"no threshold leaves out {share:.0%} of the feed-forwards; the nearest does {found:.0%}.")
    return min(float(best), 1.0)


@dataclass(frozen=True)
class SaturationRule:
    """Says which tokens are saturated after a block."""

    threshold: float
    warmup: int

    def done(self, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        """BoolTensor [B, T] from the states before and after the feed-forward."""
        return cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1) >= self.threshold


@dataclass(frozen=True)
class LacRule:
    """Says for which tokens a block is a void; remembers the range of each token's growths."""

    alpha: float

    def voids(self, x_BTD: Tensor, y_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """BoolTensor [B, T] from the states before and after a block, and the range for the next one."""
        return lac_voids(y_BTD.float().norm(dim=-1) - x_BTD.float().norm(dim=-1), memory, self.alpha)


@register(SkipPolicyConfig, "decoder")
def skip_by_token(config: SkipPolicyConfig, view: BlockView) -> list[Change]:
    """The changes by which a decoder leaves out what a policy says, token by token."""
    from mmskip.hf.mlp_skipping import mlp_changes, void_changes

    if config.policy == "lac":
        return void_changes(view, LacRule(config.alpha))
    if config.made_for != fingerprint(view):
        raise ValueError(
            f"the policy was calibrated on {config.made_for or 'no model'}; this one is {fingerprint(view)}. Use "
            "SkipPolicyConfig.calibrated(model, data)."
        )
    chosen = _chosen(len(view.blocks), config.cold_first, config.cold_last)
    return mlp_changes(view, SaturationRule(config.threshold, config.warmup), chosen)
