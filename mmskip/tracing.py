"""Record what really runs in a model: `with mmskip.trace(model) as trace`, for every family.

A trace hooks the sites of a model (its blocks, the stages of a UNet, the convolutions of a CNN). Mechanisms that run
only a part of a site say so through `mmskip.recording.Recorder`.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmskip import families
from mmskip.families.base import Site
from mmskip.meters import Meter
from mmskip.operations import OperationCounter, Tally
from mmskip.recording import ForwardRecord, LayerRecord, Recorder, Trace, active
from mmskip.registry import applied
from mmskip.swap import states_of

__all__ = ["ForwardRecord", "LayerRecord", "Trace", "trace"]

# a UNet or a CNN may hold a list of layers that looks like an encoder's
BUILT_IN = ("decoder", "vlm", "encoder_decoder", "unet", "encoder", "cnn")

# the arguments by which the length of a call is read, before all others
_INPUTS = ("inputs_embeds", "input_ids", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "sample")


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Record what runs: `with mmskip.trace(model) as trace: model(**batch)`.

    Works on changed and on untouched models of every family. Nothing of it remains on the model afterwards. Forwards
    of compiled blocks are not seen.

    Raises:
        ValueError: no family fits the model, or its family has no meter.
        RuntimeError: another trace is being recorded.
    """
    if active.get() is not None:
        raise RuntimeError("a trace is being recorded already; end it before the next one.")
    meter = meter_of(model)
    session = _Session(meter)
    token = active.set(session.recorder)
    try:
        with ExitStack() as stack:
            session.install(stack)
            yield session.trace
    finally:
        active.reset(token)


def meter_of(model: nn.Module) -> Meter:
    """Return the meter of a model's family, by which traces and costs count.

    Raises:
        ValueError: no family fits the model, or its family has no meter.
    """
    view = _view(model)
    meter = view.meter()
    if not isinstance(meter, Meter):
        raise ValueError(
            f"family {view.family!r} has no meter: {type(view).__name__}.meter() returned {meter!r}. Return a "
            "mmskip.meters.Meter, or leave the method out to count every operation that runs."
        )
    return meter


def _view(model: nn.Module) -> Any:
    """Find the view of a model: by the families of its methods, then those of plug-ins, then the built-in ones."""
    methods = [record.family for record in applied(model, details=True)] if isinstance(model, nn.Module) else []
    names = families.names()
    plug_ins = [name for name in names if name not in BUILT_IN]
    return families.find(model, list(dict.fromkeys((*methods, *plug_ins, *BUILT_IN))))


class _Session:
    """One trace under way: the hooks that fill its records."""

    def __init__(self, meter: Meter) -> None:
        self.trace = Trace()
        self.recorder = Recorder()
        self._meter = meter
        self._entered: nn.Module | None = None
        self._tallies: list[Tally] = []

    def install(self, stack: ExitStack) -> None:
        """Hook the model until `stack` closes."""

        def hooked(handle: Any) -> None:
            stack.callback(handle.remove)

        for entry in self._meter.entries:
            hooked(entry.register_forward_pre_hook(self._open, with_kwargs=True))
            hooked(entry.register_forward_hook(self._close, always_call=True))
        for site in self._meter.sites:
            hooked(site.module.register_forward_pre_hook(self._enter_site))
            hooked(site.module.register_forward_hook(self._exit_site(site), with_kwargs=True))
        for module in self._meter.outside:
            hooked(module.register_forward_hook(self._measure, with_kwargs=True))
        for head in self._meter.heads:
            hooked(head.register_forward_hook(self._head))
        if self._meter.counts:
            stack.enter_context(OperationCounter(self._tally))

    def _tally(self) -> Tally | None:
        return self._tallies[-1] if self._tallies and not self.recorder.deciding else None

    def _open(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._entered is not None and entry is not self._meter.entries[0]:
            return
        batch, length = _size(args, kwargs)
        forward = ForwardRecord(batch, length, training=torch.is_grad_enabled() and entry.training)
        if self._meter.counts:
            forward.shape = tuple(tuple(v.shape) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor))
        self._entered, self._tallies = entry, [forward.outside]
        self.recorder.begin(forward)

    def _close(self, entry: nn.Module, args: Any, output: Any) -> None:
        if entry is not self._entered:
            return
        self._entered, self._tallies = None, []
        # this hook also runs after an error, without an output; the record is then incomplete
        forward = self.recorder.end(entry) if output is not None else None
        self.recorder.reset()
        if forward is not None:
            self.trace.forwards.append(forward)

    def _enter_site(self, module: nn.Module, args: Any) -> None:
        if self._entered is not None:
            self._tallies.append(Tally())

    def _exit_site(self, site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._entered is None:
                return
            counted = self._tallies.pop()
            hidden = states_of(output)
            batch, length = _positions(site, hidden)
            # blocks name their cache differently, and some get it by position
            inputs = (*args, *kwargs.values())
            cache = next((v for v in inputs if hasattr(v, "get_seq_length")), None)
            keys, kv_bytes, dense_kv_bytes = self._meter.cache_use(site, cache, length)
            slots = batch * length
            layer = LayerRecord(site.name, slots, slots, keys, keys, None, kv_bytes, dense_kv_bytes)
            layer.dense_pairs = slots * length if site.kind == "block" else None
            layer.visible = _visible(hidden)
            layer.flops = counted if self._meter.counts else self._meter.measure(module, inputs, hidden)
            layer.dense = self._meter.measure_dense(module, inputs, hidden)
            self.recorder.add(module, layer)

        return hook

    def _measure(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        forward = self.recorder.forward
        measured = self._meter.measure(module, (*args, *kwargs.values()), output)
        if forward is not None and measured is not None:
            forward.outside.linear += measured.linear
            forward.outside.activation_bytes += measured.activation_bytes

    def _head(self, head: nn.Module, args: Any, output: Tensor) -> None:
        # within a forward the head serves an exit, which is overhead
        if self.trace.forwards and self.recorder.forward is None:
            self.trace.forwards[-1].head_rows += output.numel() // output.shape[-1]


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Return B and T of a call; for images, B and the number of positions."""
    given = (*args, *(kwargs.get(name) for name in _INPUTS), *kwargs.values())
    first = next((v for v in given if isinstance(v, Tensor) and v.dim() > 1), None)
    if first is None:
        return 1, 1
    return first.shape[0], first.shape[1] if first.dim() < 4 else math.prod(first.shape[2:])


def _positions(site: Site, hidden: Any) -> tuple[int, int]:
    """Return B and T of the states after a site. The width is the last dimension of blocks, the second of maps."""
    with torch._C.DisableTorchFunctionSubclass():
        if not isinstance(hidden, Tensor) or hidden.dim() < 2:
            return 1, 1
        shape = tuple(hidden.shape)
    if site.kind == "block":
        return shape[0], math.prod(shape[1:-1])
    return shape[0], math.prod(shape[2:])


def _visible(hidden: Any) -> float | None:
    """Return the share of positions that a keep mask leaves visible; None without a mask."""
    mask = vars(hidden).get("mask") if isinstance(hidden, Tensor) else None
    return None if mask is None else float(mask.m.detach().mean())
