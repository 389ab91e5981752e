"""Watching the residual stream of a transformers decoder: what enters each block, what its attention leaves, and what
leaves it.

Shape suffixes: B batch, T tokens of a call, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmskip.families import STATE
from mmskip.families.hf_plan import parts_of


@dataclass(frozen=True)
class Residual:
    """The residual stream around a block.

    Attributes:
        index: of the block.
        x_BTD: what enters it.
        mid_BTD: after its attention has been added, or None where attention and MLP cannot be told apart.
        y_BTD: what leaves it.
    """

    index: int
    x_BTD: Tensor
    mid_BTD: Tensor | None
    y_BTD: Tensor


@contextmanager
def residuals(view: Any, seen: Callable[[Residual], None]) -> Iterator[None]:
    """Call `seen` for every block of every forward inside. To see the state between attention and MLP, a block runs a
    second time with its MLP silenced, without writing to a cache."""
    with ExitStack() as stack:
        for index, block in enumerate(view.blocks):
            _, mlp = parts_of(block)
            if view.kinds[index] == STATE:
                mlp = None
            silence = _Silence()
            if mlp is not None:
                stack.enter_context(_removed(mlp.register_forward_hook(silence)))
            hook = _watch(index, silence if mlp is not None else None, seen)
            stack.enter_context(_removed(block.register_forward_hook(hook, with_kwargs=True)))
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


class _Silence:
    """Forward hook of a module that adds nothing while it is on."""

    on = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.on:
            return None
        if isinstance(output, tuple):
            return (output[0] * 0, *output[1:])
        return output * 0


def _watch(index: int, silence: _Silence | None, seen: Callable[[Residual], None]) -> Any:
    def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        y_BTD = output[0] if isinstance(output, tuple) else output
        x_BTD = args[0] if args else kwargs["hidden_states"]
        mid_BTD = None
        if silence is not None:
            silence.on = True
            try:
                again = block.forward(*args, **kwargs)
            finally:
                silence.on = False
            mid_BTD = again[0] if isinstance(again, tuple) else again
        seen(Residual(index, x_BTD, mid_BTD, y_BTD))

    return hook
