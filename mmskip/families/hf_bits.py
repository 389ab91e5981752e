"""Blocks whose linear layers hold weights of few bits. The original weights are kept aside, so that the block can be
given back as it was; or they are freed, and it cannot.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmskip.families import HeldBits
from mmskip.ops.quantize import quantize_, stored_bytes
from mmskip.swap import Change, state_of

_NOT_OURS = ("lora_", "mmskip_")
"""Parts of names of layers that others added to a block, which stay as they are."""


_SMALL = (nn.Embedding, nn.Conv1d)
"""Modules whose weights are few, and stay as they are."""


@dataclass
class BitsState:
    """What a quantized block holds.

    Attributes:
        names: of its linear layers.
        weights: how many numbers these hold.
        original_bytes: that they took before.
        originals: by name; empty where they were freed.
    """

    bits: int
    group: int | None
    store: str
    keep: bool
    names: tuple[str, ...]
    weights: int
    original_bytes: int
    originals: dict[str, nn.Parameter] = field(default_factory=dict)


class BitsBlock(nn.Module):
    """Mixin of a block with quantized weights; its forward is its own."""

    def mmskip_begin(self) -> None:
        """Quantize."""
        state: BitsState = state_of(self, BitsBlock)
        if state.keep:
            state.originals = {name: self.get_submodule(name).weight for name in state.names}  # type: ignore[misc]
        quantize_(dict.fromkeys(state.names, state.bits), self, state.group, state.store)

    def mmskip_check_end(self) -> None:
        """Raise RuntimeError if the weights cannot be given back."""
        state: BitsState = state_of(self, BitsBlock)
        if not state.originals:
            raise RuntimeError(
                "the original weights were freed (keep_original=False), so the model cannot be given back as it was; "
                "load it anew."
            )

    def mmskip_end(self) -> None:
        """Give the weights back."""
        state: BitsState = state_of(self, BitsBlock)
        for name, weight in state.originals.items():
            self.get_submodule(name).weight = weight


def linears(view: Any, index: int) -> dict[str, nn.Linear]:
    """The linear layers of a block by name, without what others added.

    Raises:
        ValueError: the block multiplies by weights that are no `nn.Linear`, or that are quantized already.
    """
    block, found = view.blocks[index], {}
    where = f"{view.site(index)} ({type(block).__name__})"
    for name, module in block.named_modules():
        if any(part in name for part in _NOT_OURS):
            continue
        if isinstance(module, nn.Linear):
            if type(module.weight.data) is not Tensor or not module.weight.is_floating_point():
                raise ValueError(f"{where}: {name} holds {type(module.weight.data).__name__} weights already.")
            found[name] = module
            continue
        for key, weight in () if isinstance(module, _SMALL) else module.named_parameters(recurse=False):
            if weight.dim() in (2, 3) and key.startswith(("weight", "gate", "down", "up")):
                raise ValueError(
                    f"{where}: {f'{name}.{key}'.strip('.')} is a weight of {type(module).__name__}; torchao quantizes "
                    "nn.Linear layers, so this block cannot be served."
                )
    if not found:
        raise ValueError(f"{where} has no linear layers.")
    return found


def bits_changes(view: Any, bits: Mapping[int, int], group: int | None, store: str, keep: bool) -> list[Change]:
    """The changes by which blocks hold their weights in so many bits, by block index.

    Raises:
        ValueError: a block cannot be served, or the group does not divide the inputs of a layer.
    """
    changes = []
    for index, width in bits.items():
        layers = linears(view, index)
        for name, layer in layers.items():
            if group is not None and layer.in_features % group:
                raise ValueError(
                    f"group is {group}, which does not divide the {layer.in_features} inputs of {view.site(index)}."
                    f"{name}; choose a divisor, or None for one scale per output channel."
                )
        weights = [layer.weight for layer in layers.values()]
        count, size = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
        state = BitsState(width, group, store, keep, tuple(layers), count, size)
        changes.append(Change(f"{view.site(index)}.bits", view.blocks[index], BitsBlock, state))
    return changes


def held(view: Any, index: int) -> HeldBits:
    """What the weights of a block take."""
    block = view.blocks[index]
    if not isinstance(block, BitsBlock):
        plain = [layer.weight for layer in linears(view, index).values()]
        size = sum(weight.nbytes for weight in plain)
        return HeldBits(None, sum(weight.numel() for weight in plain), size, size, 0)
    state: BitsState = state_of(block, BitsBlock)
    weights: list[Any] = [block.get_submodule(name).weight for name in state.names]
    size = sum(map(stored_bytes, weights))
    kept = sum(weight.nbytes for weight in state.originals.values())
    return HeldBits(state.bits, state.weights, size, state.original_bytes, kept)
