"""Calls of transformers: the names of their arguments, checks, and values scoped to the calls of one module."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmskip.swap import base_class

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


CACHE_NAME = next(name for name in CACHE_ARGUMENTS if name in BaseModelOutputWithPast.__dataclass_fields__)
"""The cache among a model's arguments and outputs: `cache` since transformers 5.24, `past_key_values` before."""


PER_TOKEN_ARGUMENTS = ("position_ids", "position_embeddings", "cache_position", "per_layer_input")


ABSENT_ARGUMENTS = ("encoder_hidden_states", "encoder_attention_mask")
"""Arguments of cross-attention: a block may take them as long as none is passed."""


T = TypeVar("T")


class Scoped(Generic[T]):
    """A value that one module reads while a `with` block is open; other modules do not see it.

    Args:
        name: of the context variable.
    """

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[tuple[nn.Module, T] | None] = ContextVar(name, default=None)

    @contextmanager
    def given(self, module: nn.Module, value: T) -> Iterator[None]:
        """Let `module` read `value` inside the block, in place of any earlier value."""
        token = self._variable.set((module, value))
        try:
            yield
        finally:
            self._variable.reset(token)

    def of(self, module: nn.Module) -> T | None:
        """Return the value given to `module`, or None outside such a block."""
        given = self._variable.get()
        return given[1] if given is not None and given[0] is module else None


class StoredError(Exception):
    """Ends the forward of a block that is called only for its keys and values, once they are stored."""


def given_cache(call: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, or None."""
    return next((call[name] for name in CACHE_ARGUMENTS if call.get(name) is not None), None)


def inputs_of(call: Mapping[str, Any]) -> Tensor:
    """Return the embeddings [B, T, D] or ids [B, T] among the arguments of a decoder.

    Raises:
        ValueError: neither is given.
    """
    embeds: Tensor | None = call.get("inputs_embeds")
    inputs: Tensor | None = call.get("input_ids") if embeds is None else embeds
    if inputs is None:
        raise ValueError("forward got neither input_ids nor inputs_embeds.")
    return inputs


def check_ran(root: nn.Module, claimed: Iterable[int], ran: set[int]) -> None:
    """Raise RuntimeError unless all claimed blocks of `root` ran in the call that ends."""
    missing = set(claimed) - ran
    if missing:
        raise RuntimeError(
            f"blocks {sorted(missing)} of {type(root).__name__} were claimed by mmskip but did not run; something "
            "replaced or bypassed them after apply_."
        )


def argument_names(block: nn.Module) -> Any:
    """Return the parameters of a layer's `forward` by name."""
    return inspect.signature(type(block).forward).parameters


def only_new_tokens(call: Mapping[str, Any], start: int) -> bool:
    """Whether a `generate` that continues after `start` cached tokens was given the new tokens only: same rule as
    transformers, the mask is longer than the ids."""
    mask, ids = call.get("attention_mask"), call.get("input_ids")
    if not start or ids is None or mask is None or call.get("inputs_embeds") is not None:
        return False
    return bool(mask.shape[1] != ids.shape[1])


def generate_arguments(generate: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a bound `generate` by name, its ids always as `input_ids`."""
    # the mixins of other methods hide the model's own signature
    original: Any = base_class(generate.__self__)
    names = tuple(inspect.signature(original.generate).parameters)[1:]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    inputs = call.pop("inputs", None)
    if inputs is not None:
        call["input_ids"] = inputs
    return call
