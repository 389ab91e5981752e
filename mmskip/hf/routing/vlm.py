"""The module around the decoder of a vision-language model: reads the layout of a call from its pictures and, if it
builds the masks, passes their bidirectional blocks to the decoder.

Shape suffixes: B batch, T tokens of a call.
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmskip.hf.calls import generate_arguments, given_cache, only_new_tokens
from mmskip.hf.routing.call import NO_CONTEXT, Bidirectional, CallContext, call_context
from mmskip.hf.routing.generate import check_guidance, complete_layout, from_start
from mmskip.hf.routing.vlm_layout import layout_of_call
from mmskip.swap import bind, state_of

MASKED = {"gemma3": True, "paligemma": False}
"""Models that build masks around the decoder, by `config.model_type`: whether a sliding window limits their
bidirectional blocks."""


@dataclass(frozen=True)
class VisionState:
    """The module that takes the pictures (`outer`), and the decoder inside it that calls the blocks."""

    outer: nn.Module
    decoder: nn.Module


class VisionRoot(nn.Module):
    """Mixin of the module around the decoder: gives the decoder the layout and the masks of each call."""

    def forward(self, *args: Any, layout: Tensor | None = None, **kwargs: Any) -> Any:
        state: VisionState = state_of(self, VisionRoot)
        bound = bind(self, args, kwargs)
        start = _cached_tokens(given_cache(bound))
        prompt = (call_context.of(state.decoder) or NO_CONTEXT).prompt
        if layout is None and prompt is None:
            layout = layout_of_call(self, bound, start)
        context = CallContext(prompt, layout)
        if _model_type(self) in MASKED:
            context = CallContext(prompt, layout, True, bound.get("attention_mask"), _bidirectional(self, bound, start))
        with call_context.given(state.decoder, context):
            return super().forward(*args, **kwargs)


class VisionGenerator(nn.Module):
    """Mixin of a VLM with `generate`: reads the layout of the prompt before transformers encodes the pictures, since
    their sizes are gone afterwards."""

    def generate(self, *args: Any, layout: Tensor | None = None, **kwargs: Any) -> Any:
        state: VisionState = state_of(self, VisionGenerator)
        generate: Any = super().generate  # type: ignore[misc]
        call = generate_arguments(generate, args, kwargs)
        check_guidance(self, call)
        layout = _layout_of_prompt(state.outer, call) if layout is None else complete_layout(layout, call)
        with call_context.given(state.decoder, CallContext(prompt=layout)):
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
    """Return which tokens see each other in both directions, by the rules of the model's own masks; None: none."""
    kind = _model_type(outer)
    types = bound.get("token_type_ids")
    inputs: Any = bound.get("inputs_embeds") if bound.get("input_ids") is None else bound["input_ids"]
    if types is not None and kind == "paligemma" and start and bound.get("pixel_values") is None:
        types = None
    if types is None:
        if kind == "paligemma" and inputs is not None and inputs.shape[1] > 1 and not _is_causal(outer):
            raise ValueError(
                "this PaliGemma sees its prompt in both directions, and token_type_ids (0 prompt, 1 answer), which say "
                "which tokens are the prompt, are missing; pass those of the processor."
            )
        return None
    batch, length = inputs.shape[:2]
    if tuple(types.shape) != (batch, start + length) or (start and kind == "paligemma"):
        raise ValueError(
            f"token_type_ids has shape {tuple(types.shape)} for {length} tokens after {start} cached ones; expected "
            f"{(batch, start + length)}, from the start of the prompt (PaliGemma: the complete prompt in one call)."
        )
    if kind == "paligemma":
        return Bidirectional((types != 0).long().neg(), MASKED[kind])
    module: Any = sys.modules[type(outer).__module__]
    blocks_BT = module.get_block_sequence_ids_for_mask(types)
    _check_begins_outside(blocks_BT, start)
    return Bidirectional(blocks_BT[:, start:], MASKED[kind])


def _check_begins_outside(blocks_BT: Tensor, start: int) -> None:
    if start and bool(((blocks_BT[:, start] == blocks_BT[:, start - 1]) & (blocks_BT[:, start] >= 0)).any()):
        raise ValueError(
            f"the call begins within an image (token {start}), whose tokens see each other; pass it in one call."
        )


def _model_type(outer: Any) -> str:
    return str(outer.config.model_type)


def _is_causal(outer: Any) -> bool:
    return not getattr(outer.config.get_text_config(), "use_bidirectional_attention", False)
