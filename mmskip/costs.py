"""Counted cost of a trace against the dense model: FLOPs, activation bytes, KV bytes, ideal speed-up."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mmskip.operations import torch_flops
from mmskip.recording import Trace
from mmskip.tracing import meter_of

__all__ = ["Cost", "cost", "torch_flops"]


@dataclass(frozen=True)
class Cost:
    """Counted cost of what ran in a trace, beside the dense model on the same inputs.

    Attributes:
        flops, dense_flops: of all forwards (two per multiply-add; three times the forward where gradients were
            recorded). Masked and padded slots count: they are computed.
        kv_bytes, dense_kv_bytes: keys and values stored after the last forward.
        activation_bytes, dense_activation_bytes: inputs and outputs of the matrix products of the blocks, of the
            largest forward: what grows with the tokens a training step keeps.
    """

    flops: float
    dense_flops: float
    kv_bytes: int
    dense_kv_bytes: int
    activation_bytes: int
    dense_activation_bytes: int

    @property
    def ideal_speedup(self) -> float:
        """Dense FLOPs over the FLOPs that ran: the speed-up of a machine that loses nothing."""
        return self.dense_flops / self.flops if self.flops else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {**asdict(self), "ideal_speedup": self.ideal_speedup}

    def __str__(self) -> str:
        rows = [
            ("FLOPs", self.flops, self.dense_flops),
            ("KV bytes", self.kv_bytes, self.dense_kv_bytes),
            ("activation bytes", self.activation_bytes, self.dense_activation_bytes),
        ]
        parts = [f"{name} {ran:.3g} of {dense:.3g} ({ran / dense:.1%})" for name, ran, dense in rows if dense]
        return ", ".join(parts) + f"; ideal speed-up {self.ideal_speedup:.2f}x"


def cost(model: nn.Module, trace: Trace) -> Cost:
    """Count the cost of `trace`, recorded on `model` by `mmskip.trace`; models of every family.

    FLOPs follow the rules of `torch.utils.flop_counter`: matrix products, convolutions and attention. They include the
    additions of methods (routers' scores, output heads at exits), and leave out norms, activations, pooling, Fourier
    transforms and the fills of a layer mask. Layer masks, skip scales and FreeU save nothing: their cost is the dense
    model's.

    Raises:
        TypeError: the arguments are no model and trace, in this order.
        ValueError: the trace is empty, no family fits the model, the family has no meter, or the trace does not show
            the dense cost of a skipped site.
    """
    if not isinstance(model, nn.Module) or not isinstance(trace, Trace):
        raise TypeError(
            f"got {type(model).__name__} and {type(trace).__name__}; expected a model and the trace recorded on it: "
            "mmskip.cost(model, trace)."
        )
    if not trace.forwards:
        raise ValueError("the trace is empty; run the model inside `with mmskip.trace(model) as trace:`.")
    meter = meter_of(model)
    flops = dense = 0.0
    activations = dense_activations = 0
    for forward in trace.forwards:
        found = meter.forward_cost(forward, trace.forwards)
        times = 3 if forward.training else 1
        flops += times * found.flops
        dense += times * found.dense_flops
        activations = max(activations, found.activation_bytes)
        dense_activations = max(dense_activations, found.dense_activation_bytes)
    last = trace.forwards[-1].layers
    kv, dense_kv = sum(layer.kv_bytes for layer in last), sum(layer.dense_kv_bytes for layer in last)
    return Cost(flops, dense, kv, dense_kv, activations, dense_activations)
