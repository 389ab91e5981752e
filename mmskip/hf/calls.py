"""Arguments of the calls that blocks and `generate` of transformers get."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


CACHE_NAME = next(name for name in CACHE_ARGUMENTS if name in BaseModelOutputWithPast.__dataclass_fields__)
"""Of models' argument and output: `cache` since transformers 5.24, `past_key_values` before."""


PER_TOKEN_ARGUMENTS = ("position_ids", "position_embeddings", "cache_position", "per_layer_input")


ABSENT_ARGUMENTS = ("encoder_hidden_states", "encoder_attention_mask")
"""Of cross-attention: served as long as nothing is passed."""


def given_cache(call: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, or None."""
    return next((call[name] for name in CACHE_ARGUMENTS if call.get(name) is not None), None)


def argument_names(block: nn.Module) -> Any:
    """Parameters of a layer's `forward` by name."""
    return inspect.signature(type(block).forward).parameters


def only_new_tokens(call: Mapping[str, Any], start: int) -> bool:
    """Whether the arguments of a `generate` that goes on from `start` cached tokens hold the new tokens only, told by
    transformers' rule: the mask is longer than the ids."""
    mask, ids = call.get("attention_mask"), call.get("input_ids")
    if not start or ids is None or mask is None or call.get("inputs_embeds") is not None:
        return False
    return bool(mask.shape[1] != ids.shape[1])


def generate_arguments(generate: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `generate` by name, its ids always as `input_ids`."""
    call = {**dict(zip(inspect.signature(generate).parameters, args, strict=False)), **kwargs}
    inputs = call.pop("inputs", None)
    if inputs is not None:
        call["input_ids"] = inputs
    return call
