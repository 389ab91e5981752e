"""A plan: which blocks run, in which order, and which of their parts."""

from dataclasses import dataclass

PHASES = ("both", "prefill", "decode")


@dataclass(frozen=True)
class Visit:
    """One run of a block in a plan.

    Attributes:
        block: its index.
        attn, mlp: whether its attention and its MLP run.
    """

    block: int
    attn: bool = True
    mlp: bool = True


@dataclass(frozen=True)
class DepthPlan:
    """Which blocks run, in which order.

    Attributes:
        visits: in the order they run.
        phase: `both`, `prefill` (tokens of the prompt) or `decode` (tokens after it); in the other phase the model
            runs unchanged.
        fill: whether keys and values are recomputed and stored for blocks and attentions that are left out.
    """

    visits: tuple[Visit, ...]
    phase: str = "both"
    fill: bool = False
