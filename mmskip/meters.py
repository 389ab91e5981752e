"""Meters: how the models of a family are counted, FLOPs and bytes, against the dense model on the same inputs.

`Meter` is what a family supplies by `View.meter()`. `CountingMeter` serves any model: it counts operations while they
run. `ConvMeter` computes the cost of convolutions from their sizes. Decoders have theirs in `mmskip.hf.meter`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mmskip.operations import Tally
from mmskip.recording import ForwardRecord, LayerRecord

_TRACED = ("block", "stage", "conv")


@dataclass(frozen=True)
class ForwardCost:
    """Cost of one forward without its backward, as `mmskip.Cost` has it."""

    flops: float
    dense_flops: float
    activation_bytes: int
    dense_activation_bytes: int


class Meter:
    """How a family's models are traced and counted. A family may supply a subclass by `View.meter()`.

    Attributes:
        view: the model, as its family sees it.
        sites: the sites that a trace records: blocks, else stages, else convolutions.
        entries: modules whose call is a forward, the root first; the others where they are called outside of it.
        outside: further modules whose cost is measured, one by one.
        heads: output heads that run after the root; rows are counted.
        counts: whether operations are counted while the model runs.
    """

    counts = False

    def __init__(self, view: Any) -> None:
        self.view = view
        found = (view.sites(kind) for kind in _TRACED)
        self.sites = next((sites for sites in found if sites), ())
        self.entries: tuple[nn.Module, ...] = (view.root,)
        self.outside: tuple[nn.Module, ...] = ()
        self.heads: tuple[nn.Module, ...] = ()

    def cache_use(self, site: Any, cache: Any, length: int) -> tuple[int, int, int]:
        """Return the keys that each query of a dense block attends over, the KV bytes stored, and the KV bytes that a
        dense block stores, after a call of `site` with `length` tokens."""
        return 0, 0, 0

    def measure(self, module: nn.Module, inputs: Any, output: Any) -> Tally | None:
        """Return the cost of a call of `module` from its inputs and output; None where it is not computed here."""
        return None

    def measure_dense(self, module: nn.Module, inputs: Any, output: Any) -> Tally | None:
        """Return the cost of the same call in the dense model; None where that runs the same."""
        return None

    def forward_cost(self, forward: ForwardRecord, trace: Sequence[ForwardRecord]) -> ForwardCost:
        """Count one forward of a trace. The other forwards may show the dense cost of a site that was skipped.

        Raises:
            ValueError: nothing in the trace shows it.
        """
        raise ValueError(
            f"{type(self).__name__} of family {self.view.family!r} does not count: it has no forward_cost(forward, "
            "trace). Derive it from mmskip.meters.CountingMeter, or define that method."
        )


class CountingMeter(Meter):
    """Counts every operation while the model runs, by the rules of `torch.utils.flop_counter`.

    The dense cost of a site that ran in part is read from a site of the same sizes that ran in full in this forward,
    or scaled by its rows and by the pairs of its attention, or taken from a forward of the trace with the same inputs
    in which it ran in full.
    """

    counts = True

    def __init__(self, view: Any) -> None:
        super().__init__(view)
        self.entries = (view.root, *_owners(view))
        self._modules = {site.name: site for site in self.sites}
        self._signatures: dict[str, tuple[Any, ...]] = {}

    def forward_cost(self, forward: ForwardRecord, trace: Sequence[ForwardRecord]) -> ForwardCost:
        """Add up the counted operations, and those of the dense model."""
        ran = forward.outside.flops + forward.overhead.flops
        dense, kept_bytes, dense_bytes = forward.outside.flops, 0, 0
        for layer in forward.layers:
            assert layer.flops is not None
            full = self._dense(layer, forward, trace) if layer.recorded else layer.flops
            ran, kept_bytes = ran + layer.flops.flops, kept_bytes + layer.flops.activation_bytes
            dense, dense_bytes = dense + full.flops, dense_bytes + full.activation_bytes
        return ForwardCost(ran, dense, kept_bytes, dense_bytes)

    def _dense(self, layer: LayerRecord, forward: ForwardRecord, trace: Sequence[ForwardRecord]) -> Tally:
        # the first layer of a stack always runs; a later one that first runs now also does what it skipped before
        alike = [other for other in forward.layers if self._alike(layer, other)]
        for other in alike:
            if _is_full(other) and other.flops is not None:
                return other.flops
        for other in alike:
            if other.ran and not other.filled and not other.reused and other.flops is not None:
                return _scaled(other, other.flops)
        for record in trace:
            if record.shape == forward.shape:
                for other in record.layers:
                    if other.site == layer.site and _is_full(other) and other.flops is not None:
                        return other.flops
        raise ValueError(
            f"the trace does not show the dense cost of {layer.site}: it did not run in full for inputs "
            f"of shapes {list(forward.shape)}. Begin the trace before the first forward (of a sampler: the first "
            "step), or supply a meter for its family (View.meter)."
        )

    def _alike(self, layer: LayerRecord, other: LayerRecord) -> bool:
        return layer.tokens == other.tokens and self._signature(layer.site) == self._signature(other.site)

    def _signature(self, name: str) -> tuple[Any, ...]:
        """Sites of equal signatures cost the same."""
        if name not in self._signatures:
            site = self._modules[name]
            shapes = [
                tuple(parameter.shape)
                for module_name, module in site.module.named_modules()
                if not isinstance(module, nn.Embedding) and "mmskip_" not in module_name
                for parameter in module.parameters(recurse=False)
                if parameter.dim() > 1
            ]
            kind = getattr(site.module, "attention_type", None)
            self._signatures[name] = (site.stack, type(site.module).__name__, kind, *shapes)
        return self._signatures[name]


def _is_full(layer: LayerRecord) -> bool:
    joint = layer.pairs in (None, layer.dense_pairs)
    return layer.ran == layer.tokens and not layer.filled and not layer.reused and joint


def _scaled(layer: LayerRecord, counted: Tally) -> Tally:
    """Scale the cost of a site to all its tokens."""
    rows = layer.tokens / layer.ran
    pairs = rows if layer.pairs is None or layer.dense_pairs is None else layer.dense_pairs / layer.pairs
    return Tally(counted.linear * rows, counted.pairs * pairs, round(counted.activation_bytes * rows))


def _owners(view: Any) -> list[nn.Module]:
    """Return, for each of several stacks, the outermost module that holds no blocks of another. It may be called alone,
    as the encoder is in `generate`, or one tower of two."""
    stacks = [{id(block) for block in blocks} for blocks in view.stacks.values()]
    owners = []
    for stack in stacks if len(stacks) > 1 else ():
        rest = set().union(*(other for other in stacks if other is not stack))
        for module in view.root.modules():
            held = {id(part) for part in module.modules()}
            if stack <= held and not rest & held:
                owners.append(module)
                break
    return owners


class ConvMeter(Meter):
    """Computes the cost of convolutions and linear layers from their sizes. A mask saves nothing: hidden positions
    are computed too, and what fills them in is not counted.

    Args:
        replaced: sites at which another module stands than in the dense network, with the original one.
    """

    def __init__(self, view: Any, replaced: Sequence[tuple[Any, nn.Module]] = ()) -> None:
        super().__init__(view)
        convs = {id(site.module) for site in self.sites}
        self.sites += tuple(site for site, _ in replaced if id(site.module) not in convs)
        self._originals = {id(site.module): original for site, original in replaced}
        self.outside = tuple(
            module
            for module in view.root.modules()
            if isinstance(module, nn.Linear | _ConvNd) and id(module) not in {*convs, *self._originals}
        )

    def measure(self, module: nn.Module, inputs: Any, output: Any) -> Tally | None:
        """Return the cost of a convolution or a linear layer."""
        if not isinstance(module, nn.Linear | _ConvNd) or not isinstance(output, Tensor):
            return None
        weight: Any = module.weight
        read, written = _size(inputs[0]), _size(output)
        if isinstance(module, nn.Linear):
            places = written // module.out_features
        elif isinstance(module, _ConvTransposeNd):
            places = read // module.in_channels
        else:
            places = written // module.out_channels
        return Tally(2.0 * places * weight.numel(), 0.0, weight.element_size() * (read + written))

    def measure_dense(self, module: nn.Module, inputs: Any, output: Any) -> Tally | None:
        """Return the cost of the original of a replaced module."""
        original = self._originals.get(id(module))
        return None if original is None else self.measure(original, inputs, output)

    def forward_cost(self, forward: ForwardRecord, trace: Sequence[ForwardRecord]) -> ForwardCost:
        """Add up the layers. The dense network runs the same ones, with the originals of those that were replaced."""
        ran = [layer.flops or Tally() for layer in forward.layers]
        dense = [layer.dense or layer.flops or Tally() for layer in forward.layers]
        flops, dense_flops = (forward.outside.flops + sum(tally.flops for tally in part) for part in (ran, dense))
        held, dense_held = (sum(tally.activation_bytes for tally in part) for part in (ran, dense))
        return ForwardCost(flops, dense_flops, held, dense_held)


def _size(x: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return x.numel()
