"""Family `decoder`: causal language models of transformers, found by structure."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmskip.families.base import View
from mmskip.hf.meter import DecoderMeter
from mmskip.hf.routing.block import RoutedBlock
from mmskip.hf.structure import (
    is_stack,
    kinds,
    parts_of,
    unfit,
    windows,
    without_attention,
)


@dataclass(frozen=True)
class DecoderView(View):
    """A causal decoder.

    Attributes:
        root: the module that calls the blocks.
        blocks: in the order they run.
        windows: per block, the sliding window in tokens, or None for full attention.
        generators: the modules around the root that have `generate`.
        kinds: per block `full`, `sliding` or `state`, see `mmskip.hf.structure`.
    """

    family: str
    root: nn.Module
    blocks: tuple[nn.Module, ...]
    windows: tuple[int | None, ...]
    generators: tuple[nn.Module, ...]
    kinds: tuple[str, ...]

    @property
    def stacks(self) -> dict[str, tuple[nn.Module, ...]]:  # type: ignore[override]
        """The blocks."""
        return {"block": self.blocks}

    def parts(self, block: nn.Module) -> tuple[Any, Any]:
        """Return the attention and the MLP of a block; None for a part that is not a module."""
        return parts_of(block)

    @property
    def config(self) -> Any:
        """The text config of the model."""
        return self.root.config

    @property
    def width(self) -> int:
        """Hidden width D."""
        return int(self.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states: that of the embeddings, since blocks may be quantized."""
        dtype: torch.dtype = self.root.get_input_embeddings().weight.dtype  # type: ignore[operator]
        return dtype if dtype.is_floating_point else self.root.dtype  # type: ignore[return-value]

    def site(self, index: int) -> str:
        """Return the site name of a block."""
        return f"block.{index}"

    @property
    def routed(self) -> tuple[int, ...]:
        """Indices of the blocks that process a subset of the tokens."""
        return tuple(index for index, block in enumerate(self.blocks) if isinstance(block, RoutedBlock))

    def attention_types(self) -> tuple[str, ...]:
        """Return the kind of each block: `full` or `sliding`, or `state` for a block that must see every token."""
        return self.kinds

    def meter(self) -> DecoderMeter:
        """Return what counts the blocks."""
        return DecoderMeter(self)


def match(model: nn.Module, causal: bool = True) -> tuple[DecoderView | None, str]:
    """Return the view of `model`, or None and the reason why it does not fit.

    Args:
        causal: whether the self-attention must declare itself causal; False where a module around the decoder builds
            the masks.
    """
    from transformers import PreTrainedModel

    found = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            stacks = [child for child in module.children() if is_stack(child, causal)]
            found += [(module, tuple(stack.children())) for stack in stacks]
    if not found:
        return None, (
            "needs a transformers causal decoder: a PreTrainedModel with a list of decoder layers that take "
            "`hidden_states` and hold a causal self-attention (`is_causal`, `layer_idx`); " + without_attention(model)
        )
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module, _ in found)
        return None, f"found several stacks of decoder layers ({names}); pass the one to be changed"
    root, blocks = found[0]
    reason = unfit(model, root, blocks, causal)
    if reason:
        return None, reason
    generators = tuple(
        m for m in model.modules() if isinstance(m, PreTrainedModel) and m.can_generate() and _contains(m, root)
    )
    config = root.config
    view = DecoderView("decoder", root, blocks, windows(config, len(blocks)), generators, kinds(config, blocks, causal))
    return view, ""


def _contains(module: nn.Module, inner: nn.Module) -> bool:
    return any(child is inner for child in module.modules())
