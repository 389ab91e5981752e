"""Family `encoder`: transformer encoders of transformers, timm and open_clip, alone or as two towers, found by
structure.

Shape suffixes: B batch, T tokens, D width.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmskip.families.base import View
from mmskip.hf.calls import CACHE_ARGUMENTS
from mmskip.hf.structure import mlp_among

_INPUTS = ("hidden_states", "x", "q_x")
_IMAGE = ("vis", "image", "pixel")


@dataclass(frozen=True)
class EncoderView(View):
    """One encoder, or a tower for images and one for text.

    Attributes:
        root: the model.
        stacks: layers in order, by name: `encoder`, or `image` and `text`.
    """

    root: nn.Module
    stacks: dict[str, tuple[nn.Module, ...]]
    family: str = field(default="encoder")

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All layers, stack by stack."""
        return tuple(block for blocks in self.stacks.values() for block in blocks)

    def site(self, index: int) -> str:
        """Return the site name of a layer."""
        names = [f"{name}.{i}" for name, blocks in self.stacks.items() for i in range(len(blocks))]
        return names[index]

    def hidden_argument(self, block: nn.Module) -> str:
        """Return the argument of a block's `forward` that carries the hidden states."""
        return _first_argument(block)

    def parts(self, block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """Return the attention and the MLP of a block, None for a part that is not a separate module."""
        attentions = _attentions(block)
        return attentions[0], mlp_among(child for child in block.children() if child not in attentions)


def match(model: nn.Module) -> tuple[EncoderView | None, str]:
    """Return the view of `model`, or None and the reason why it does not fit."""
    found = {
        name: (parent, tuple(stack.children()))
        for parent_name, parent in model.named_modules()
        for child_name, stack in parent.named_children()
        if _is_stack(stack)
        for name in [f"{parent_name}.{child_name}".strip(".")]
    }
    kind = type(model).__name__
    if not 1 <= len(found) <= 2:
        return None, (
            f"{kind} has {len(found)} stacks of layers of one kind that map states [B, T, D] by an attention; expected "
            "one, or a tower for images and one for text"
        )
    for name, (parent, _) in found.items():
        if getattr(parent, "batch_first", True) is False:
            return None, f"{name} of {kind} has the samples in the second dimension (batch_first=False)"
    stacks = [blocks for _, blocks in found.values()]
    if len(stacks) == 1:
        return EncoderView(model, {"encoder": stacks[0]}), ""
    images = [any(word in name.lower() for word in _IMAGE) for name in found]
    if sum(images) != 1:
        return None, f"{kind} has the stacks {', '.join(found)}, of which one should be a tower for images"
    image = images.index(True)
    return EncoderView(model, {"image": stacks[image], "text": stacks[1 - image]}), ""


def _is_stack(stack: nn.Module) -> bool:
    """Return whether `stack` is a list of encoder layers."""
    if not isinstance(stack, nn.ModuleList | nn.Sequential) or len(stack) < 2:
        return False
    blocks = list(stack.children())
    return len({type(block) for block in blocks}) == 1 and _first_argument(blocks[0]) in _INPUTS and _attends(blocks[0])


def _first_argument(block: nn.Module) -> str:
    names: list[Any] = [p for p in inspect.signature(type(block).forward).parameters if p != "self"]
    return names[0] if names else ""


def _attends(block: nn.Module) -> bool:
    """Return whether a layer has one attention, over all tokens of its input at once."""
    arguments = inspect.signature(type(block).forward).parameters
    # layers of BERT are written for both; those of a decoder keep keys and values, which exited samples would lack
    caches = any(name in arguments for name in CACHE_ARGUMENTS) and "encoder_hidden_states" not in arguments
    if caches or getattr(block, "is_decoder", False) or any(getattr(m, "is_causal", False) for m in block.modules()):
        return False
    return len(_attentions(block)) == 1


def _attentions(block: nn.Module) -> list[nn.Module]:
    """Return the children of a layer that are attentions, by their names."""
    named = [(name.lower(), child) for name, child in block.named_children() if any(True for _ in child.parameters())]
    return [child for name, child in named if "att" in name and "norm" not in name]
