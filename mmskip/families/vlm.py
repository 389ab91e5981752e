"""Family `vlm`: vision-language models of transformers whose language model is a causal decoder.

The blocks are those of `decoder`; this file adds the module around the decoder, which knows the frames and images
of a call and, in some models, builds the masks.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmskip.families import decoder
from mmskip.families.decoder import DecoderView
from mmskip.hf.calls import generate_arguments, given_cache, only_new_tokens
from mmskip.hf.routing.block import Bidirectional, GivenCall, given_call
from mmskip.hf.routing.generate import (
    LayoutGenerator,
    check_guidance,
    from_start,
    given_prompt,
    prompt_layout,
    whole_prompt,
)
from mmskip.hf.routing.vlm_layout import layout_of_call
from mmskip.protocols import TokenPolicy
from mmskip.swap import Change, bind, state_of

# models that build masks around the decoder: whether a sliding window cuts their bidirectional blocks
_MASKED = {"gemma3": True, "paligemma": False}


@dataclass(frozen=True)
class VlmView(DecoderView):
    """The decoder of a VLM, and the module around it.

    Attributes:
        outer: the module that merges vision features into the embeddings and calls the decoder.
    """

    outer: nn.Module

    def subset_changes(
        self,
        policies: Mapping[int, TokenPolicy],
        children: Mapping[int, dict[str, nn.Module]],
        attention: str | None = None,
    ) -> list[Change]:
        """As `DecoderView.subset_changes`; the layout comes from the inputs of the VLM."""
        changes = [c for c in super().subset_changes(policies, children, attention) if c.mixin is not LayoutGenerator]
        if isinstance(self.outer, VisionRoot):
            return changes
        changes.append(Change("vlm", self.outer, VisionRoot, VisionState(self.outer, self.root)))
        changes += [
            Change("generate", module, VisionGenerator, VisionState(self.outer, self.root))
            for module in self.generators
        ]
        return changes


@dataclass(frozen=True)
class VisionState:
    """The module that takes the pictures, and the decoder inside it that calls the blocks."""

    outer: nn.Module
    decoder: nn.Module


class VisionRoot(nn.Module):
    """Mixin of the module around the decoder: tells the decoder the layout and the masks of each call."""

    def forward(self, *args: Any, layout: Tensor | None = None, **kwargs: Any) -> Any:
        state: VisionState = state_of(self, VisionRoot)
        bound = bind(self, args, kwargs)
        start = _cached_tokens(given_cache(bound))
        if layout is None and given_prompt(state.decoder) is None:
            layout = layout_of_call(self, bound, start)
        kind = self.config.model_type  # type: ignore[union-attr]
        call = GivenCall(layout)
        if kind in _MASKED:
            call = GivenCall(layout, True, bound.get("attention_mask"), _bidirectional(self, bound, start))
        with given_call(state.decoder, call):
            return super().forward(*args, **kwargs)


class VisionGenerator(nn.Module):
    """Mixin of a VLM with `generate`: reads the layout of the prompt before transformers encodes the pictures, after
    which their sizes are gone."""

    def generate(self, *args: Any, layout: Tensor | None = None, **kwargs: Any) -> Any:
        state: VisionState = state_of(self, VisionGenerator)
        generate: Any = super().generate  # type: ignore[misc]
        call = generate_arguments(generate, args, kwargs)
        check_guidance(self, call)
        layout = _layout_of_prompt(state.outer, call) if layout is None else whole_prompt(layout, call)
        with prompt_layout(state.decoder, layout):
            return generate(*args, **kwargs)


def _layout_of_prompt(outer: nn.Module, call: dict[str, Any]) -> Tensor | None:
    start = _cached_tokens(given_cache(call))
    ids = call.get("input_ids")
    if ids is None or not start:
        return layout_of_call(outer, call, start)
    new = ids if only_new_tokens(call, start) else ids[:, start:]
    layout = layout_of_call(outer, {**call, "input_ids": new}, start)
    assert layout is not None
    return from_start(layout, start)


def _cached_tokens(cache: Any) -> int:
    length = cache.get_seq_length() if cache is not None else 0
    return length if isinstance(length, int) else 0


def _bidirectional(outer: Any, bound: dict[str, Any], start: int) -> Bidirectional | None:
    """Which tokens see each other whatever their order, by the rules of the model's own masks."""
    kind = outer.config.model_type
    types = bound.get("token_type_ids")
    inputs: Any = bound.get("inputs_embeds") if bound.get("input_ids") is None else bound["input_ids"]
    if types is not None and kind == "paligemma" and start and bound.get("pixel_values") is None:
        types = None
    if types is None:
        if kind == "paligemma" and inputs is not None and inputs.shape[1] > 1 and not _is_causal(outer):
            raise ValueError(
                "this PaliGemma sees its prompt in both directions, and which tokens are the prompt is told by "
                "token_type_ids (0 prompt, 1 answer), which are missing; pass those of the processor."
            )
        return None
    batch, length = inputs.shape[:2]
    if tuple(types.shape) != (batch, start + length) or (start and kind == "paligemma"):
        raise ValueError(
            f"token_type_ids has shape {tuple(types.shape)} for {length} tokens after {start} cached ones; expected "
            f"{(batch, start + length)}, from the start of the prompt (PaliGemma: the whole prompt in one call)."
        )
    if kind == "paligemma":
        return Bidirectional((types != 0).long().neg(), _MASKED[kind])
    module: Any = sys.modules[type(outer).__module__]
    blocks_BT = module.get_block_sequence_ids_for_mask(types)
    _check_begins_outside(blocks_BT, start)
    return Bidirectional(blocks_BT[:, start:], _MASKED[kind])


def _check_begins_outside(blocks_BT: Tensor, start: int) -> None:
    if start and bool(((blocks_BT[:, start] == blocks_BT[:, start - 1]) & (blocks_BT[:, start] >= 0)).any()):
        raise ValueError(
            f"the call begins within an image (token {start}), whose tokens see each other; pass it in one call."
        )


def _is_causal(outer: Any) -> bool:
    return not getattr(outer.config.get_text_config(), "use_bidirectional_attention", False)


def _sees(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "vision_config", None) is not None


def match(model: nn.Module) -> tuple[VlmView | None, str]:
    """The view of `model`, or None and the reason why it does not fit."""
    from transformers import PreTrainedModel

    found, reasons = [], []
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not _sees(module):
            continue
        masked = module.config.model_type in _MASKED
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
