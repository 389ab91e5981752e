"""Watch or edit the residual stream of a transformers decoder: before each block, after its attention, after it.

Shape suffixes: B batch, T tokens of a call, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mmskip.hf.structure import added_by, parts_of
from mmskip.protocols import STATE
from mmskip.swap import states_of, with_states


@dataclass(frozen=True)
class Residual:
    """The residual stream around a block.

    Attributes:
        index: of the block.
        x_BTD: before it.
        mid_BTD: after its attention has been added; None where attention and MLP cannot be separated.
        y_BTD: after it.
    """

    index: int
    x_BTD: Tensor
    mid_BTD: Tensor | None
    y_BTD: Tensor


@contextmanager
def residuals(view: Any, seen: Callable[[Residual], None], middle: bool = True) -> Iterator[None]:
    """Call `seen` for every block of every forward inside.

    Args:
        view: a decoder.
        seen: called with the residual stream around a block.
        middle: find the state between attention and MLP too: a block then runs a second time with its MLP silenced,
            which needs a call without a cache.
    """
    with ExitStack() as stack:
        for index, block in enumerate(view.blocks):
            _, mlp = parts_of(block)
            if view.kinds[index] == STATE or not middle:
                mlp = None
            silence = _Silence()
            if mlp is not None:
                stack.enter_context(_removed(mlp.register_forward_hook(silence)))
            hook = _watch(index, silence if mlp is not None else None, seen)
            stack.enter_context(_removed(block.register_forward_hook(hook, with_kwargs=True)))
        yield


@contextmanager
def leaving(view: Any, index: int, edit: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """In forwards inside, replace the output of a block by `edit(input_BTD, output_BTD)`."""

    def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x_BTD = args[0] if args else kwargs["hidden_states"]
        return with_states(output, edit(x_BTD, states_of(output)))

    with _removed(view.blocks[index].register_forward_hook(hook, with_kwargs=True)):
        yield


@contextmanager
def entering(view: Any, index: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In forwards inside, replace the input of a block by `edit(input_BTD)`."""

    def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    with _removed(view.blocks[index].register_forward_pre_hook(hook, with_kwargs=True)):
        yield


def calls_of(data: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of the model for each batch of calibration data: ids [B, T], or a dictionary.

    Raises:
        ValueError: `data` is not a list of batches.
    """
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise ValueError(f"data is one {type(data).__name__}; expected a list of batches, ids [B, T] or dictionaries.")
    for batch in data:
        if not (isinstance(batch, Mapping) or (isinstance(batch, Tensor) and batch.dim() == 2)):
            found = f"a tensor of shape {list(batch.shape)}" if isinstance(batch, Tensor) else f"{batch!r:.80}"
            raise ValueError(f"data holds {found}; expected ids [B, T], or dictionaries of the model's arguments.")
        yield {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)


def mlp_cosines(view: Any, model: nn.Module, data: Iterable[Any], chosen: range, warmup: int) -> Tensor:
    """Measure the cosines [blocks, tokens] between the states before and after the MLP of some blocks, for every real
    token of the data after the warm-up. The state before is the output minus what the MLP, or the norm after it, added.

    Args:
        view: a decoder.
        model: that holds it.
        data: see `calls_of`.
        chosen: block indices.
        warmup: tokens at the start of each row that are left out.

    Raises:
        ValueError: a block's MLP is not added last to its residual stream, or the data are empty.
    """
    found: dict[int, list[Tensor]] = {index: [] for index in chosen}
    added: dict[int, Tensor] = {}
    keep_BT: Tensor | None = None

    def seen(residual: Residual) -> None:
        if residual.index not in found:
            return
        if residual.mid_BTD is None:
            raise ValueError(f"{view.site(residual.index)} has no single module for its MLP after its attention.")
        before_BTD = residual.y_BTD - added.pop(residual.index)
        scale = float(residual.y_BTD.abs().max())
        if float((before_BTD - residual.mid_BTD).abs().max()) > 1e-2 * scale:
            raise ValueError(
                f"{view.site(residual.index)} ({type(view.blocks[residual.index]).__name__}) scales what its MLP "
                "adds, so the state before it is unknown; this policy does not apply."
            )
        cosine_BT = cosine_similarity(before_BTD.float(), residual.y_BTD.float(), dim=-1)
        found[residual.index].append(cosine_BT[keep_BT] if keep_BT is not None else cosine_BT.flatten())

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # the block runs a second time with its MLP silenced
            added.setdefault(index, states_of(output))

        return hook

    training = model.training
    model.eval()
    try:
        with ExitStack() as stack, torch.no_grad():
            for index in chosen:
                if parts_of(view.blocks[index])[1] is not None:
                    stack.enter_context(_removed(added_by(view.blocks[index]).register_forward_hook(note(index))))
            stack.enter_context(residuals(view, seen))
            for call in calls_of(data):
                real = call.get("attention_mask", torch.ones_like(call["input_ids"]))
                keep_BT = real.bool() & (real.cumsum(-1) > warmup)
                model(**{**call, "use_cache": False})
    finally:
        model.train(training)
    if not any(found.values()):
        raise ValueError("data is empty; expected batches of token ids.")
    return torch.stack([torch.cat(found[index]) for index in chosen]).cpu()


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


class _Silence:
    """Forward hook that multiplies a module's output by 0 while it is on."""

    on = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.on:
            return None
        return with_states(output, states_of(output) * 0)


def _watch(index: int, silence: _Silence | None, seen: Callable[[Residual], None]) -> Any:
    def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        y_BTD = states_of(output)
        x_BTD = args[0] if args else kwargs["hidden_states"]
        mid_BTD = None
        if silence is not None:
            silence.on = True
            try:
                again = block.forward(*args, **kwargs)
            finally:
                silence.on = False
            mid_BTD = states_of(again)
        seen(Residual(index, x_BTD, mid_BTD, y_BTD))

    return hook
