"""Family `vlm`: vision-language models of transformers whose language model is a causal decoder.

The blocks are those of `decoder`; this family adds the module around the decoder, which knows the frames and images
of a call and, in some models, builds the masks.
"""

from dataclasses import dataclass

from torch import nn

from mmskip.families import decoder
from mmskip.families.decoder import DecoderView
from mmskip.hf.routing.vlm import MASKED


@dataclass(frozen=True)
class VlmView(DecoderView):
    """The decoder of a VLM and the module around it.

    Attributes:
        outer: the module that merges vision features into the embeddings and calls the decoder.
    """

    outer: nn.Module


def _sees(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "vision_config", None) is not None


def match(model: nn.Module) -> tuple[VlmView | None, str]:
    """Return the view of `model`, or None and the reason why it does not fit."""
    from transformers import PreTrainedModel

    found, reasons = [], []
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not _sees(module):
            continue
        masked = module.config.model_type in MASKED
        for child in module.children():
            if _sees(child) or not isinstance(child, PreTrainedModel):
                continue
            view, reason = decoder.match(child, causal=not masked)
            if view is not None:
                found.append((module, view))
            elif getattr(child.config, "vocab_size", None):
                reasons.append(f"the language model of {type(module).__name__} does not fit: {reason}")
    if len(found) == 1:
        outer, view = found[0]
        generators = tuple(
            m
            for m in model.modules()
            if isinstance(m, PreTrainedModel) and m.can_generate() and any(child is outer for child in m.modules())
        )
        return VlmView("vlm", view.root, view.blocks, view.windows, generators, view.kinds, outer), ""
    if found:
        names = ", ".join(type(module).__name__ for module, _ in found)
        return None, f"found several vision-language models ({names}); pass the one to be changed"
    name = type(model).__name__
    if reasons:
        return None, "; ".join(dict.fromkeys(reasons))
    return None, (
        "needs a transformers vision-language model: a PreTrainedModel whose config has a vision_config, with a causal "
        f"decoder as its language model; {name} has none"
    )
