"""FFN skipping (FFN-SkipLLM, arXiv 2404.03865): leave out the feed-forwards of tokens that they no longer change.

The cosine between the state before a feed-forward block and the state after its residual rises through the middle of
the stack. Once it reaches a threshold, the feed-forwards of the following blocks are skipped for that token. Attention
always runs, so keys and values are complete. The first and last blocks ("cold") and the first tokens of a sequence
(warm-up) always run. The paper gives no thresholds: `mmskip.calibration.ffn_threshold` finds one.

Shape suffixes: B batch, T tokens, D width.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmskip.config import MethodConfig, check_count, check_number, renamed
from mmskip.exits.criteria import saturation
from mmskip.importance_table import fingerprint
from mmskip.protocols import BlockView
from mmskip.registry import register
from mmskip.swap import Change


@renamed({"made_for": "model_fingerprint"})
@dataclass(frozen=True)
class FFNSkipConfig(MethodConfig):
    """Skip the feed-forwards of saturated tokens. `mmskip.calibration.ffn_threshold(model, data)` returns one.

    Args:
        threshold: cosine from which a token is saturated, in (-1, 1].
        cold_first: blocks at the start whose feed-forward always runs, and whose cosine is not tested, >= 0.
        cold_last: blocks at the end whose feed-forward always runs, >= 0.
        warmup: tokens at the start of each sequence whose feed-forwards always run, >= 0; padding does not count.
        model_fingerprint: the architecture it was calibrated on, see `mmskip.importance_table.fingerprint`.

    Example:
        >>> config = FFNSkipConfig(threshold=0.98, cold_first=2, cold_last=2, warmup=8)
        >>> FFNSkipConfig.from_dict(config.to_dict()) == config
        True
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("mlp",)

    threshold: float = 1.0
    cold_first: int = 1
    cold_last: int = 1
    warmup: int = 0
    model_fingerprint: str = ""

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, -1, 1, open_low=True)
        for name in ("cold_first", "cold_last", "warmup"):
            check_count(name, getattr(self, name))


def warm_blocks(count: int, cold_first: int, cold_last: int) -> range:
    """Return the indices of the blocks whose feed-forwards may be skipped.

    Raises:
        ValueError: fewer than two are left.
    """
    if count - cold_first - cold_last < 2:
        raise ValueError(
            f"cold_first={cold_first} and cold_last={cold_last} leave {max(count - cold_first - cold_last, 0)} of "
            f"{count} blocks; FFN skipping needs two."
        )
    return range(cold_first, count - cold_last)


@dataclass(frozen=True)
class SaturationRule:
    """Says which tokens are saturated after a block."""

    threshold: float
    warmup: int

    def done(self, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        """Return BoolTensor [B, T] from the states before and after the feed-forward."""
        return saturation(after_BTD, before_BTD) >= self.threshold


@register(FFNSkipConfig, "decoder")
def ffn_skip_decoder(config: FFNSkipConfig, view: BlockView) -> list[Change]:
    """Build the changes by which a decoder skips the feed-forwards of saturated tokens."""
    from mmskip.hf.mlp_skipping import mlp_changes

    if config.model_fingerprint != fingerprint(view):
        raise ValueError(
            f"the threshold was calibrated on {config.model_fingerprint or 'no model'}; this one is "
            f"{fingerprint(view)}. Use mmskip.calibration.ffn_threshold(model, data)."
        )
    chosen = warm_blocks(len(view.blocks), config.cold_first, config.cold_last)
    return mlp_changes(view, SaturationRule(config.threshold, config.warmup), chosen)
