"""Blocks whose linear layers hold weights of few bits. The original weights are kept aside, so that the block can be
given back as it was; or they are freed, and it cannot.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmskip.ops.quantize import check_bits, quantize_, stored_bytes
from mmskip.protocols import HeldBits
from mmskip.swap import Change, state_of

_NOT_OURS = ("lora_", "mmskip_")
"""Parts of names of layers that others added to a block, which stay as they are."""


_SMALL = (nn.Embedding, nn.Conv1d)
"""Modules whose weights are few, and stay as they are."""


@dataclass
class BitsState:
    """What a quantized block holds.

    Attributes:
        layers: its linear layers by name; peft may wrap them later, so that the names then lead to its layers.
        weights: how many numbers these hold.
        original_bytes: that they took before.
        originals: by name; empty where they were freed.
        trained: the parameters of the block beside these weights that took gradients before.
    """

    bits: int
    group: int | None
    store: str
    keep: bool
    layers: dict[str, nn.Linear]
    weights: int
    original_bytes: int
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    trained: list[nn.Parameter] = field(default_factory=list)


class BitsBlock(nn.Module):
    """Mixin of a block with quantized weights; its forward is its own."""

    def mmskip_begin(self) -> None:
        """Quantize."""
        state: BitsState = state_of(self, BitsBlock)
        state.originals = {name: layer.weight for name, layer in state.layers.items()}  # type: ignore[misc]
        own = {id(weight) for weight in state.originals.values()}
        state.trained = [p for p in self.parameters() if p.requires_grad and id(p) not in own]
        quantize_(dict.fromkeys(state.layers, state.bits), self, state.group, state.store)

    def mmskip_settle(self) -> None:
        """Free the original weights, if they are not to be kept."""
        state: BitsState = state_of(self, BitsBlock)
        if not state.keep:
            state.originals = {}

    def mmskip_check_end(self) -> None:
        """Raise RuntimeError if the weights cannot be given back."""
        state: BitsState = state_of(self, BitsBlock)
        if not state.originals:
            raise RuntimeError(
                "the original weights were freed (keep_original=False), so the model cannot be given back as it was; "
                "load it anew."
            )
        inside = set(self.modules())
        lost = [name for name, layer in state.layers.items() if layer not in inside]
        if lost:
            raise RuntimeError(
                f"{', '.join(lost)} of {type(self).__name__} were replaced by another tool after mmskip, so their "
                "weights cannot be given back; undo that first."
            )

    def mmskip_end(self) -> None:
        """Give the weights back."""
        state: BitsState = state_of(self, BitsBlock)
        # few bits take no gradients, so that what peft froze since shows beside them
        frozen = bool(state.trained) and not any(parameter.requires_grad for parameter in state.trained)
        for name, weight in state.originals.items():
            if frozen or self.get_submodule(name) is not state.layers[name]:
                weight.requires_grad_(False)
            state.layers[name].weight = weight


def _weights(block: nn.Module) -> Iterator[tuple[str, str, nn.Module, Any]]:
    """The weights that a block multiplies by, without what others added: name and kind of the module, its weight."""
    for name, module in block.named_modules():
        if any(part in name for part in _NOT_OURS) or isinstance(module, _SMALL):
            continue
        if isinstance(module, nn.Linear):
            yield name, "weight", module, module.weight
            continue
        for key, weight in module.named_parameters(recurse=False):
            if weight.dim() in (2, 3) and key.startswith(("weight", "gate", "down", "up")):
                yield name, key, module, weight


def linears(view: Any, index: int) -> dict[str, nn.Linear]:
    """The linear layers of a block by name, without what others added.

    Raises:
        ValueError: the block multiplies by weights that are no `nn.Linear`, or that are quantized already.
    """
    block, found = view.blocks[index], {}
    where = f"{view.site(index)} ({type(block).__name__})"
    for name, key, module, weight in _weights(block):
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{where}: {f'{name}.{key}'.strip('.')} is a weight of {type(module).__name__}; torchao quantizes "
                "nn.Linear layers, so this block cannot be served."
            )
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            raise ValueError(f"{where}: {name} holds {type(weight.data).__name__} weights already.")
        found[name] = module
    if not found:
        raise ValueError(f"{where} has no linear layers.")
    return found


def bits_changes(view: Any, bits: Mapping[int, int], group: int | None, store: str, keep: bool) -> list[Change]:
    """The changes by which blocks hold their weights in so many bits, by block index.

    Raises:
        ValueError: a block cannot be served, the group does not divide the inputs of a layer, or torchao cannot store
            such weights on the device and in the dtype of the blocks.
    """
    changes, places = [], set()
    for index, width in bits.items():
        layers = linears(view, index)
        for name, layer in layers.items():
            if group is not None and layer.in_features % group:
                raise ValueError(
                    f"group is {group}, which does not divide the {layer.in_features} inputs of {view.site(index)}."
                    f"{name}; choose a divisor, or None for one scale per output channel."
                )
        weights = [layer.weight for layer in layers.values()]
        places |= {(width, weight.device, weight.dtype) for weight in weights}
        count, size = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
        state = BitsState(width, group, store, keep, layers, count, size)
        changes.append(Change(f"{view.site(index)}.bits", view.blocks[index], BitsBlock, state))
    for width, device, dtype in sorted(places, key=str):
        check_bits(width, group, store, device, dtype)
    return changes


def held(view: Any, index: int) -> HeldBits:
    """What the weights of a block take."""
    block = view.blocks[index]
    if not isinstance(block, BitsBlock):
        plain = [weight for _, _, _, weight in _weights(block)]
        size = sum(map(stored_bytes, plain))
        return HeldBits(None, sum(weight.numel() for weight in plain), size, size, 0)
    state: BitsState = state_of(block, BitsBlock)
    size = sum(stored_bytes(layer.weight) for layer in state.layers.values())
    kept = sum(weight.nbytes for weight in state.originals.values())
    return HeldBits(state.bits, state.weights, size, state.original_bytes, kept)
