"""What `generate` knows of its prompt, which transformers does not hand on to the decoder: the layout.

Shape suffixes: B batch, T tokens of the prompt.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from mmskip.hf.calls import generate_arguments, given_cache, only_new_tokens
from mmskip.swap import state_of
from mmskip.tokens.groups import TEXT

_prompt_layout: ContextVar[tuple[nn.Module, Tensor] | None] = ContextVar("mmskip_prompt_layout", default=None)


@contextmanager
def prompt_layout(root: nn.Module, layout: Tensor | None) -> Iterator[None]:
    """Calls of `root` inside take their part of the layout of a prompt, [B, T]; None: nothing is given."""
    token = _prompt_layout.set(None if layout is None else (root, layout))
    try:
        yield
    finally:
        _prompt_layout.reset(token)


def given_prompt(root: nn.Module) -> Tensor | None:
    """The layout of the prompt of which calls of `root` take their part, [B, T]; None outside of `generate`."""
    given = _prompt_layout.get()
    return given[1] if given is not None and given[0] is root else None


def from_start(layout: Tensor, start: int) -> Tensor:
    """The layout of the new tokens, [B, T], behind `start` cached ones, [B, start + T]; those are past: text."""
    return nn.functional.pad(layout, (start, 0), value=TEXT)


def whole_prompt(layout: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The layout of a prompt from the start of its cache, given that of the tokens passed to `generate`.

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
    """Raise if `generate` would call the model for two prompts in turn, of which only one has a layout."""
    config = call.get("generation_config") or model.generation_config
    scale = call.get("guidance_scale", getattr(config, "guidance_scale", None))
    if scale is not None and scale != 1:
        raise ValueError(
            f"guidance_scale is {scale}; classifier-free guidance calls the model for a second prompt, whose layout "
            "mmskip cannot know. Leave guidance_scale out (or 1), or call mmskip.remove_(model) first."
        )


class LayoutGenerator(nn.Module):
    """Mixin of a module with `generate`: takes `layout=` of the prompt and hands it to the decoder."""

    def generate(self, *args: Any, layout: Tensor | None = None, **kwargs: Any) -> Any:
        generate: Any = super().generate  # type: ignore[misc]
        call = generate_arguments(generate, args, kwargs)
        check_guidance(self, call)
        if layout is None:
            return generate(*args, **kwargs)
        layout = whole_prompt(layout, call)
        with prompt_layout(state_of(self, LayoutGenerator), layout):
            return generate(*args, **kwargs)
