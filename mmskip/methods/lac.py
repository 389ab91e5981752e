"""LAC (arXiv 2505.14467): undo the update of blocks that are voids for a token.

A block is a void for a token whose norm grows by less than alpha times the range of its growths at the earlier blocks.
The block has run by then, so this saves nothing: it shows what the voids are worth. The static set, which saves time,
is `LayerPlanConfig.lac`.

Shape suffixes: B batch, T tokens, D width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mmskip.config import MethodConfig, check_number
from mmskip.exits.voids import LAC_ALPHA, lac_voids
from mmskip.protocols import BlockView
from mmskip.registry import register
from mmskip.swap import Change


@dataclass(frozen=True)
class LACConfig(MethodConfig):
    """Undo voids per token and sample, for analysis; saves nothing.

    Args:
        alpha: share of the range of growths below which a block is a void, >= 0; 0.8 as published.

    Example:
        >>> LACConfig(alpha=0.9).to_dict()
        {'alpha': 0.9}
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("update",)

    alpha: float = LAC_ALPHA

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0)


@dataclass(frozen=True)
class LACRule:
    """Says for which tokens a block is a void; remembers the range of each token's growths."""

    alpha: float

    def voids(self, x_BTD: Tensor, y_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return BoolTensor [B, T] from the states before and after a block, and the range for the next one."""
        return lac_voids(y_BTD.float().norm(dim=-1) - x_BTD.float().norm(dim=-1), memory, self.alpha)


@register(LACConfig, "decoder")
def lac_decoder(config: LACConfig, view: BlockView) -> list[Change]:
    """Build the changes by which a decoder undoes voids."""
    from mmskip.hf.mlp_skipping import void_changes

    return void_changes(view, LACRule(config.alpha))
