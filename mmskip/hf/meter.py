"""Counts blocks of transformers: FLOPs and bytes per token and per (query, key) pair, from the sizes of their weights.

Embeddings, norms, activations, softmax, rotary positions, and the scans of state-space and linear attention count
nothing.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicSlidingWindowLayer, EncoderDecoderCache

from mmskip.hf.streaming.cache import StreamCache
from mmskip.hf.structure import attention_of, output_projection, parts_of
from mmskip.meters import CountingMeter, ForwardCost, Meter
from mmskip.protocols import STATE
from mmskip.recording import ForwardRecord, LayerRecord

Products = list[tuple[int, int, int]]


class DecoderMeter(Meter):
    """Counts the blocks of a causal decoder, also one inside a VLM."""

    def __init__(self, view: Any) -> None:
        super().__init__(view)
        found = (module.get_output_embeddings() for module in view.generators)
        self.heads = tuple({id(head): head for head in found if head is not None}.values())

    def products(self, part: nn.Module) -> Products:
        """List the weight matrices of a block or of a part of it that every token is multiplied by: (inputs, outputs,
        how many).

        Raises:
            ValueError: expert weights whose use per token the config does not give.
        """
        products: Products = []
        for module in part.modules():
            weight: Any = getattr(module, "weight", None)
            if isinstance(module, nn.Linear):
                # not the shape of the weight, which quantization packs
                products.append((module.in_features, module.out_features, 1))
            elif type(module).__name__ == "Conv1D":
                products.append((weight.shape[0], weight.shape[1], 1))
            for parameter in module._parameters.values():
                # weights of three dimensions are experts, except for short convolutions, whose cost is small
                if parameter is not None and parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
                    products.append((parameter.shape[1], parameter.shape[2], self._experts_per_token()))
        return products

    def _experts_per_token(self) -> int:
        config = self.view.config
        count = getattr(config, "num_experts_per_tok", None)
        if count is None:
            raise ValueError(f"{type(config).__name__} does not say how many experts a token uses.")
        return int(count)

    def attention_width(self, index: int) -> int:
        """Heads times head width of a block (the mean of keys' and values' width where they differ); 0 without
        attention."""
        if self.view.kinds[index] == STATE:
            return 0
        config, attention = self.view.config, attention_of(self.view.blocks[index], causal=False)
        head = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
        head = head or self.view.width // config.num_attention_heads
        key = getattr(attention, "qk_head_dim", head)
        value = getattr(attention, "v_head_dim", head)
        return int((key + value) * config.num_attention_heads) // 2

    def block_flops(self, index: int, part: str, keys: int) -> float:
        """FLOPs per token of `"attn"`, `"mlp"`, `"fill"` (what stores keys and values: all of the attention before its
        scores) or `"block"`, with so many keys."""
        block = self.view.blocks[index]
        attention, mlp = parts_of(block)
        pairs = 4.0 * self.attention_width(index) * keys
        modules = {"block": block, "attn": attention, "fill": attention, "mlp": mlp}
        linear = 0 if modules[part] is None else _flops(self.products(modules[part]))
        if part == "fill" and attention is not None:
            linear -= _flops(self.products(output_projection(attention)))
        return linear + (pairs if part in ("block", "attn") else 0.0)

    def head_flops(self) -> float:
        """FLOPs of the output heads per token."""
        weights: list[Any] = [head.weight for head in self.heads]
        return 2.0 * sum(weight.numel() for weight in weights)

    def cache_use(self, site: Any, cache: Any, length: int) -> tuple[int, int, int]:
        """As `Meter.cache_use`. A block without attention stores nothing."""
        index, kinds = site.index, self.view.kinds
        if kinds[index] == STATE:
            return 0, 0, 0
        if cache is None:
            return length, 0, 0
        if isinstance(cache, StreamCache):
            return cache.use(index)
        same = [i for i, kind in enumerate(kinds) if kind == kinds[index] and i < len(cache.layers)]
        held = [i for i in same if getattr(cache.layers[i], "keys", None) is not None]
        if not held:
            return 0, 0, 0
        # a plan keeps some entries short or empty: a dense block would store what another of its kind does
        total, window = max(int(cache.get_seq_length(i)) for i in held), self.view.windows[index]
        entry, own = cache.layers[index if index in held else held[0]], index in held
        past = total - length if window is None else min(total - length, window - 1)
        stored = total if window is None else min(total, window - 1)
        per_slot = (entry.keys[:, :, :1].numel() + entry.values[:, :, :1].numel()) * entry.keys.element_size()
        return past + length, per_slot * entry.keys.shape[-2] * own, per_slot * stored

    def forward_cost(self, forward: ForwardRecord, trace: Sequence[ForwardRecord]) -> ForwardCost:
        """Count the blocks by what they ran, and the output head by its rows."""
        blocks = [_BlockCost(self, index) for index in range(len(self.view.blocks))]
        ran = full = 0.0
        kept_bytes = full_bytes = 0
        for block, layer in zip(blocks, forward.layers, strict=True):
            ran += block.flops(layer)
            full += layer.tokens * (block.linear + block.pair * layer.dense_keys)
            if layer.kept is not None:
                ran += block.score * layer.tokens + block.gate * layer.ran
            kept_bytes += block.activation * layer.ran
            full_bytes += block.activation * layer.tokens
        head = self.head_flops() * forward.head_rows
        return ForwardCost(ran + head + forward.overhead.flops, full + head, kept_bytes, full_bytes)


class _BlockCost:
    """FLOPs and bytes of one block per token."""

    def __init__(self, meter: DecoderMeter, index: int) -> None:
        block = meter.view.blocks[index]
        products = meter.products(block)
        self.linear = _flops(products)
        self.pair = 4.0 * meter.attention_width(index)
        router: Any = getattr(block, "mmskip_router", None)
        rates: tuple[int, int] = (0, 0) if router is None else router.flops()
        self.score, self.gate = rates
        item = next(p.element_size() for p in block.parameters() if p.is_floating_point())
        self.meter, self.index = meter, index
        self.activation = item * sum(count * (rows + columns) for rows, columns, count in products)

    def flops(self, layer: LayerRecord) -> float:
        """FLOPs of what a block ran. Where attention and MLP ran apart, the rest goes with every run."""
        if layer.attn is None:
            ran = layer.ran * (self.linear + self.pair * layer.keys)
            return ran + layer.filled * self._part("fill") if layer.filled else ran
        attn, mlp, fill = (self._part(name) for name in ("attn", "mlp", "fill"))
        ran = layer.attn * (attn + self.pair * layer.keys)
        return ran + (layer.mlp or 0) * mlp + layer.filled * fill + layer.ran * (self.linear - attn - mlp)

    def _part(self, name: str) -> float:
        return self.meter.block_flops(self.index, name, 0)


class EncoderDecoderMeter(CountingMeter):
    """Counts the operations of an encoder-decoder as they run, and the bytes of its caches."""

    def cache_use(self, site: Any, cache: Any, length: int) -> tuple[int, int, int]:
        """As `Meter.cache_use`: keys and values of the decoder's tokens, and of the encoder's that it attends to."""
        if site.stack != "decoder" or cache is None:
            return 0, 0, 0
        parts: tuple[Any, ...] = (cache,)
        if isinstance(cache, EncoderDecoderCache):
            parts = (cache.self_attention_cache, cache.cross_attention_cache)
        stored, dense = zip(*(_held(part.layers, site.index) for part in parts), strict=True)
        return 0, sum(stored), sum(dense)


def _held(layers: Sequence[Any], index: int) -> tuple[int, int]:
    """Bytes in an entry of a cache, and bytes that a dense layer would store there: as the fullest entry of its kind
    does. Entries after it are not up to date yet."""
    if index >= len(layers):
        return 0, 0
    sliding = isinstance(layers[index], DynamicSlidingWindowLayer)
    same = [layer for layer in layers[: index + 1] if isinstance(layer, DynamicSlidingWindowLayer) == sliding]
    stored = [
        sum(part.numel() * part.element_size() for part in (layer.keys, layer.values))
        for layer in same
        if getattr(layer, "keys", None) is not None
    ]
    own = getattr(layers[index], "keys", None) is not None
    return (stored[-1] if own else 0), max(stored, default=0)


def _flops(products: Products) -> float:
    return 2.0 * sum(count * rows * columns for rows, columns, count in products)
