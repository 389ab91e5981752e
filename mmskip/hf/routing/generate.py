"""The layout of a prompt in `generate`, which transformers does not pass on to the decoder.

Shape suffixes: B batch, T tokens of the prompt.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmskip.hf.calls import generate_arguments, given_cache, only_new_tokens
from mmskip.hf.routing.call import CallContext, call_context
from mmskip.swap import state_of
from mmskip.tokens.groups import TEXT


def from_start(layout: Tensor, start: int) -> Tensor:
    """Put `start` cached tokens, which count as text, before the layout of new tokens: [B, T] -> [B, start + T]."""
    return nn.functional.pad(layout, (start, 0), value=TEXT)


def complete_layout(layout: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Return the layout of a prompt from the start of its cache, given that of the tokens passed to `generate`.

    Raises:
        ValueError: the layout does not fit the other arguments.
    """
    cache = given_cache(call)
    start = cache.get_seq_length() if cache is not None else 0
    new = only_new_tokens(call, start)
    for given in (call.get("input_ids"), call.get("inputs_embeds")):
        if given is None or not given.shape[1]:
            continue
        rows, length = given.shape[:2]
        lengths = (length, start + length) if new else (length,)
        if layout.dim() != 2 or layout.shape[0] != rows or layout.shape[1] not in lengths:
            raise ValueError(
                f"generate got a layout of shape {tuple(layout.shape)} for a prompt of {(rows, length)} that holds "
                f"{'the new tokens only' if new else 'everything from its start'}; expected one entry per token of the "
                "prompt."
            )
        return from_start(layout, start) if new and layout.shape[1] == length else layout
    return layout


def check_guidance(model: Any, call: Mapping[str, Any]) -> None:
    """Raise ValueError if `generate` would call the model for two prompts in turn, of which only one has a layout."""
    config = call.get("generation_config") or model.generation_config
    scale = call.get("guidance_scale", getattr(config, "guidance_scale", None))
    if scale is not None and scale != 1:
        raise ValueError(
            f"guidance_scale is {scale}; classifier-free guidance calls the model for a second prompt, whose layout "
            "mmskip cannot know. Leave guidance_scale out (or 1), or call mmskip.remove_(model) first."
        )


class LayoutGenerator(nn.Module):
    """Mixin of a module with `generate`: takes the `layout=` of the prompt and passes it to the decoder."""

    def generate(self, *args: Any, layout: Tensor | None = None, **kwargs: Any) -> Any:
        generate: Any = super().generate  # type: ignore[misc]
        call = generate_arguments(generate, args, kwargs)
        check_guidance(self, call)
        if layout is None:
            return generate(*args, **kwargs)
        layout = complete_layout(layout, call)
        with call_context.given(state_of(self, LayoutGenerator), CallContext(prompt=layout)):
            return generate(*args, **kwargs)
