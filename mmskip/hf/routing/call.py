"""The context of a decoder's call, and the data that the decoder passes to its routed blocks.

Shape suffixes: B batch, T tokens of a call.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmskip.hf.calls import Scoped
from mmskip.ops.hf_attention import NAME as RAGGED
from mmskip.ops.hf_attention import Packings
from mmskip.tokens.groups import TokenGroups

ROUTING_KEY = "mmskip_routing"
"""Keyword under which a `RoutedCall` travels through the model to its blocks."""

BACKENDS = ("sdpa", "eager", "flex_attention", RAGGED)


@dataclass(frozen=True)
class Bidirectional:
    """Tokens that see each other in both directions; all tokens of such a block must come in one call.

    Attributes:
        blocks_BT: LongTensor [B, T], the block of a token, -1 for a token that sees the past only.
        windowed: whether a sliding window limits what tokens of a block see.
    """

    blocks_BT: Tensor
    windowed: bool


@dataclass(frozen=True)
class CallContext:
    """Facts about a decoder's next call from `generate` and the module around the decoder.

    Attributes:
        prompt: layout of the prompt of the running `generate`, LongTensor [B, T of the prompt]; None outside of it.
        layout: layout of the call, LongTensor [B, T]; None where the decoder has to work it out.
        builds_masks: whether the module around the decoder builds the masks; `padding_mask` is then the one it got.
        padding_mask: Tensor [B, past + T], 1 on real tokens; None: no padding.
        bidirectional: the pairs of tokens that see each other in those masks despite causal order; None: none.
    """

    prompt: Tensor | None = None
    layout: Tensor | None = None
    builds_masks: bool = False
    padding_mask: Tensor | None = None
    bidirectional: Bidirectional | None = None


call_context: Scoped[CallContext] = Scoped("mmskip_call_context")
"""The context of the calls of a decoder."""

NO_CONTEXT = CallContext()


class RoutedCall:
    """Data that a decoder passes to its routed blocks in one forward.

    Attributes:
        groups: the vision tokens of the call.
        segments_BT: sequence numbers of packed sequences, LongTensor [B, T]; None: one sequence per row.
        bidirectional: which tokens see each other in both directions; None: none.
        frames: the frames seen after the call, see `mmskip.hf.routing.frames`.
        packings: packed masks that blocks of equal selections share.
        ran: indices of the routed blocks that ran so far.
    """

    __slots__ = ("bidirectional", "frames", "groups", "packings", "ran", "segments_BT")

    def __init__(
        self,
        groups: TokenGroups,
        segments_BT: Tensor | None,
        bidirectional: Bidirectional | None = None,
        frames: Tensor | None = None,
    ) -> None:
        self.groups = groups
        self.segments_BT = segments_BT
        self.bidirectional = bidirectional
        self.frames = frames
        self.packings = Packings()
        self.ran: set[int] = set()


def check_backend(config: Any) -> None:
    """Raise ValueError unless routed blocks can build masks for the attention implementation of `config`."""
    if config._attn_implementation not in BACKENDS:
        raise ValueError(
            f"attn_implementation is {config._attn_implementation!r}; routed blocks support {', '.join(BACKENDS)}. "
            "Call model.set_attn_implementation('sdpa')."
        )
