"""Hold the weights of a block's linear layers in few bits.

The original weights are kept in memory, so that the block can be restored; or they are freed, and it cannot.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmskip.ops.quantize import check_bits, quantize_, stored_bytes
from mmskip.swap import Change, around, state_of

_NOT_OURS = ("lora_", "mmskip_")
"""Substrings in the names of layers that others added to a block, which are not quantized."""
_SMALL = (nn.Embedding, nn.Conv1d)
"""Modules of few weights, which are not quantized."""


@dataclass(frozen=True)
class HeldBits:
    """The weights of a block's linear layers.

    Attributes:
        bits: per weight; None: not quantized.
        weights: how many.
        stored_bytes: their size now, scales included.
        original_bytes: their size before quantization.
        kept_bytes: size of the original weights that are still in memory.
    """

    bits: int | None
    weights: int
    stored_bytes: int
    original_bytes: int
    kept_bytes: int


@dataclass
class BitsState:
    """State of a quantized block.

    Attributes:
        bits, group, store, keep: as in `LayerBitsConfig`.
        layers: its linear layers by name; peft may wrap them later, and the names then lead to peft's layers.
        weights: how many numbers these hold.
        original_bytes: their size before quantization.
        originals: the original weights by name; empty where they were freed.
        trained: the block's other parameters that took gradients before.
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
    """Mixin of a block with quantized weights; its forward does not change."""

    def mmskip_begin(self) -> None:
        """Quantize the weights."""
        state: BitsState = state_of(self, BitsBlock)
        state.originals = {name: layer.weight for name, layer in state.layers.items()}  # type: ignore[misc]
        own = {id(weight) for weight in state.originals.values()}
        state.trained = [p for p in self.parameters() if p.requires_grad and id(p) not in own]
        quantize_(dict.fromkeys(state.layers, state.bits), self, state.group, state.store)

    def mmskip_settle(self) -> None:
        """Free the original weights unless they are to be kept."""
        state: BitsState = state_of(self, BitsBlock)
        if not state.keep:
            state.originals = {}

    def mmskip_check_end(self) -> None:
        """Raise RuntimeError if the weights cannot be restored."""
        state: BitsState = state_of(self, BitsBlock)
        if not state.originals:
            raise RuntimeError(
                "the original weights were freed (keep_original=False), so the model cannot be restored; load it again."
            )
        inside = set(self.modules())
        lost = [name for name, layer in state.layers.items() if layer not in inside]
        if lost:
            raise RuntimeError(
                f"{', '.join(lost)} of {type(self).__name__} were replaced by another tool after mmskip, so their "
                "weights cannot be restored; undo that first."
            )

    def mmskip_end(self) -> None:
        """Restore the weights."""
        state: BitsState = state_of(self, BitsBlock)
        # quantized weights take no gradients, so whether peft froze the block since shows in its other parameters
        frozen = bool(state.trained) and not any(parameter.requires_grad for parameter in state.trained)
        for name, weight in state.originals.items():
            if frozen or self.get_submodule(name) is not state.layers[name]:
                weight.requires_grad_(False)
            state.layers[name].weight = weight
            state.layers[name].__dict__.pop("extra_repr", None)  # torchao puts one that prints its own weight


def _weights(block: nn.Module) -> Iterator[tuple[str, str, nn.Module, Any]]:
    """Yield the weights that a block multiplies by, without those others added: (module name, key, module, weight)."""
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
    """Return the linear layers of a block by name, without those others added.

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
    """Build the changes by which blocks hold their weights in few bits.

    Args:
        bits: per weight, by block index.
        group, store, keep: as in `LayerBitsConfig`.

    Raises:
        ValueError: a block cannot be served, the group does not divide the inputs of a layer, or torchao cannot store
            such weights on the device and in the dtype of the blocks.
    """
    changes, places, sites = [], set(), view.sites("block")
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
        changes.append(around(sites[index], BitsBlock, state, "weights"))
    for width, device, dtype in sorted(places, key=str):
        check_bits(width, group, store, device, dtype)
    return changes


def held(view: Any, index: int) -> HeldBits:
    """Measure the weights of a block."""
    block = view.blocks[index]
    if not isinstance(block, BitsBlock):
        plain = [weight for _, _, _, weight in _weights(block)]
        size = sum(map(stored_bytes, plain))
        return HeldBits(None, sum(weight.numel() for weight in plain), size, size, 0)
    state: BitsState = state_of(block, BitsBlock)
    size = sum(stored_bytes(layer.weight) for layer in state.layers.values())
    kept = sum(weight.nbytes for weight in state.originals.values())
    return HeldBits(state.bits, state.weights, size, state.original_bytes, kept)
