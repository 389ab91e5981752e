"""Counted cost of a trace against the dense model: FLOPs, activation bytes, KV bytes, ideal speed-up."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmskip import families
from mmskip.tracing import ForwardRecord, LayerRecord, Trace


@dataclass(frozen=True)
class Cost:
    """Counted cost of what a trace says ran, beside the dense model on the same inputs.

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
        """A JSON-ready dictionary."""
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
    """Count the cost of `trace`, recorded on `model` by `mmskip.trace`.

    FLOPs follow the rules of `torch.utils.flop_counter` (matrix products and attention), plus the routers' scores.

    Raises:
        TypeError: these are no model and trace, in this order.
        ValueError: the trace is empty, or no family fits the model.
    """
    if not isinstance(model, nn.Module) or not isinstance(trace, Trace):
        raise TypeError(
            f"got {type(model).__name__} and {type(trace).__name__}; expected a model and the trace recorded on it: "
            "mmskip.cost(model, trace)."
        )
    if not trace.forwards:
        raise ValueError("the trace is empty; run the model inside `with mmskip.trace(model) as trace:`.")
    view = families.find(model, ("decoder", "vlm"))
    blocks = [_BlockCost(view, index) for index in range(len(view.blocks))]
    head = view.head_flops()
    flops = dense = 0.0
    activations = dense_activations = 0
    for forward in trace.forwards:
        ran, full, kept_bytes, full_bytes = _forward_cost(blocks, forward)
        times = 3 if forward.training else 1
        flops += times * (ran + head * forward.head_rows)
        dense += times * (full + head * forward.head_rows)
        activations = max(activations, kept_bytes)
        dense_activations = max(dense_activations, full_bytes)
    last = trace.forwards[-1].layers
    kv, dense_kv = sum(layer.kv_bytes for layer in last), sum(layer.dense_kv_bytes for layer in last)
    return Cost(flops, dense, kv, dense_kv, activations, dense_activations)


class _BlockCost:
    """FLOPs and bytes of one block per token."""

    def __init__(self, view: Any, index: int) -> None:
        products = view.matrix_products(index)
        self.linear = 2.0 * sum(count * rows * columns for rows, columns, count in products)
        self.pair = 4.0 * view.attention_width(index)
        self.score, self.gate = view.router_flops(index)
        item = view.item_bytes(index)
        self.view, self.index = view, index
        self.activation = item * sum(count * (rows + columns) for rows, columns, count in products)

    def planned(self, layer: LayerRecord) -> float:
        """FLOPs of a block that a plan runs in parts: what is neither attention nor MLP goes with every visit."""
        parts = {name: self.view.block_flops(self.index, name, 0) for name in ("attn", "mlp", "fill")}
        rest = self.linear - parts["attn"] - parts["mlp"]
        attn = (layer.attn or 0) * (parts["attn"] + self.pair * layer.keys)
        return attn + (layer.mlp or 0) * parts["mlp"] + layer.filled * parts["fill"] + layer.ran * rest


def _forward_cost(blocks: list[_BlockCost], forward: ForwardRecord) -> tuple[float, float, int, int]:
    ran = full = 0.0
    kept_bytes = full_bytes = 0
    for block, layer in zip(blocks, forward.layers, strict=True):
        if layer.attn is None:
            ran += layer.ran * (block.linear + block.pair * layer.keys)
        else:
            ran += block.planned(layer)
        full += layer.tokens * (block.linear + block.pair * layer.dense_keys)
        if layer.kept is not None:
            ran += block.score * layer.tokens + block.gate * layer.ran
        kept_bytes += block.activation * layer.ran
        full_bytes += block.activation * layer.tokens
    return ran, full, kept_bytes, full_bytes


def torch_flops() -> FlopCounterMode:
    """torch's own counter of FLOPs, a context, which also counts attention on a CPU (some versions leave it out)."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)
