"""Family `decoder`: causal language models of transformers, found by structure."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmskip.exits.heads import TiedHead
from mmskip.families.base import View
from mmskip.hf.exits.block import ExitRule
from mmskip.hf.exits.decoder import exit_changes, tied_head
from mmskip.hf.routing.block import RoutedBlock
from mmskip.hf.streaming.cache import StreamCache
from mmskip.hf.structure import (
    attention_of,
    is_stack,
    kinds,
    output_projection,
    parts_of,
    unfit,
    windows,
    without_attention,
)
from mmskip.protocols import STATE
from mmskip.swap import Change


@dataclass(frozen=True)
class DecoderView(View):
    """A causal decoder: the module that calls the blocks (`root`), and the blocks in order.

    Attributes:
        windows: per block, the sliding window in tokens, or None for full attention.
        generators: the modules around the root that have `generate`.
        kinds: per block `full`, `sliding` or `state`, see `mmskip.hf.structure`.
    """

    family: str
    root: nn.Module
    blocks: tuple[nn.Module, ...]
    windows: tuple[int | None, ...]
    generators: tuple[nn.Module, ...]
    kinds: tuple[str, ...]

    @property
    def stacks(self) -> dict[str, tuple[nn.Module, ...]]:  # type: ignore[override]
        """The blocks."""
        return {"block": self.blocks}

    def parts(self, block: nn.Module) -> tuple[Any, Any]:
        """The attention and the MLP of a block, None for a part that is no module of its own."""
        return parts_of(block)

    @property
    def config(self) -> Any:
        """The text config of the model."""
        return self.root.config

    @property
    def width(self) -> int:
        """Hidden width D."""
        return int(self.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states, which the embeddings set, whatever quantization made of the blocks."""
        dtype: torch.dtype = self.root.get_input_embeddings().weight.dtype  # type: ignore[operator]
        return dtype if dtype.is_floating_point else self.root.dtype  # type: ignore[return-value]

    def site(self, index: int) -> str:
        """The site name of a block."""
        return f"block.{index}"

    @property
    def routed(self) -> tuple[int, ...]:
        """Indices of the blocks that process a subset of the tokens."""
        return tuple(index for index, block in enumerate(self.blocks) if isinstance(block, RoutedBlock))

    def attention_types(self) -> tuple[str, ...]:
        """Per block, `full` or `sliding`; `state` for a block that must see every token."""
        return self.kinds

    def matrix_products(self, index: int) -> list[tuple[int, int, int]]:
        """Weight matrices of a block that every token is multiplied by: (inputs, outputs, how many). The scans of
        state-space and linear attention are not counted.

        Raises:
            ValueError: the block has expert weights whose use per token the config does not tell.
        """
        return self._products(self.blocks[index])

    def _products(self, whole: nn.Module) -> list[tuple[int, int, int]]:
        products = []
        for module in whole.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear):
                # not the shape of the weight, which quantization packs
                products.append((module.in_features, module.out_features, 1))
            elif type(module).__name__ == "Conv1D":
                products.append((weight.shape[0], weight.shape[1], 1))  # type: ignore[union-attr]
            for parameter in module._parameters.values():
                # weights of three dimensions are experts, but for short convolutions, whose cost is small
                if parameter is not None and parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
                    products.append((parameter.shape[1], parameter.shape[2], self._experts_per_token()))
        return products

    def _experts_per_token(self) -> int:
        count = getattr(self.config, "num_experts_per_tok", None)
        if count is None:
            raise ValueError(f"{type(self.config).__name__} does not say how many experts a token uses.")
        return int(count)

    def attention_width(self, index: int) -> int:
        """Heads times head width of a block (the mean of keys' and values' width where they differ); 0 without
        attention."""
        if self.kinds[index] == STATE:
            return 0
        config, attention = self.config, attention_of(self.blocks[index], causal=False)
        head = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
        head = head or self.width // config.num_attention_heads
        key = getattr(attention, "qk_head_dim", head)
        value = getattr(attention, "v_head_dim", head)
        return int((key + value) * config.num_attention_heads) // 2

    def block_flops(self, index: int, part: str, keys: int) -> float:
        """FLOPs per token of `"attn"`, `"mlp"`, `"fill"` (what stores keys and values: all of the attention before its
        scores) or `"block"`, with so many keys."""
        attention, mlp = parts_of(self.blocks[index])
        pairs = 4.0 * self.attention_width(index) * keys
        modules = {"block": self.blocks[index], "attn": attention, "fill": attention, "mlp": mlp}
        linear = 0 if modules[part] is None else _flops(self._products(modules[part]))
        if part == "fill" and attention is not None:
            linear -= _flops(self._products(output_projection(attention)))
        return linear + (pairs if part in ("block", "attn") else 0.0)

    def head_flops(self) -> float:
        """FLOPs of the output heads per token."""
        heads = {id(h): h for h in (m.get_output_embeddings() for m in self.generators) if h is not None}  # type: ignore[operator]
        return 2.0 * sum(h.weight.numel() for h in heads.values())

    def item_bytes(self, index: int) -> int:
        """Bytes of one number of the hidden states."""
        return next(p.element_size() for p in self.blocks[index].parameters() if p.is_floating_point())

    def router_flops(self, index: int) -> tuple[int, int]:
        """FLOPs per token of the scores and of the gates of a block's router."""
        router = getattr(self.blocks[index], "mmskip_router", None)
        return (0, 0) if router is None else router.flops()

    def cache_use(self, index: int, cache: Any, length: int) -> tuple[int, int, int]:
        """After a call with `length` tokens: keys a dense block attends over, KV bytes stored, KV bytes a dense block
        stores. A block without attention stores none."""
        if self.kinds[index] == STATE:
            return 0, 0, 0
        if cache is None:
            return length, 0, 0
        if isinstance(cache, StreamCache):
            return cache.use(index)
        same = [i for i, kind in enumerate(self.kinds) if kind == self.kinds[index] and i < len(cache.layers)]
        held = [i for i in same if getattr(cache.layers[i], "keys", None) is not None]
        if not held:
            return 0, 0, 0
        # a plan leaves some entries short or empty: a dense block would store what another of its kind does
        total, window = max(int(cache.get_seq_length(i)) for i in held), self.windows[index]
        entry = cache.layers[index if index in held else held[0]]
        past = total - length if window is None else min(total - length, window - 1)
        stored = total if window is None else min(total, window - 1)
        per_slot = (entry.keys[:, :, :1].numel() + entry.values[:, :, :1].numel()) * entry.keys.element_size()
        return past + length, per_slot * entry.keys.shape[-2], per_slot * stored

    def exit_changes(self, rule: ExitRule) -> list[Change]:
        """The changes by which tokens leave the decoder early.

        Raises:
            ValueError: layers that cannot be left.
        """
        return exit_changes(self, rule)

    def head(self) -> TiedHead:
        """The tied exit head.

        Raises:
            ValueError: the output is more than a norm and a projection, or missing.
        """
        return tied_head(self)


def _flops(products: list[tuple[int, int, int]]) -> float:
    return 2.0 * sum(count * rows * columns for rows, columns, count in products)


def match(model: nn.Module, causal: bool = True) -> tuple[DecoderView | None, str]:
    """The view of `model`, or None and the reason why it does not fit. Without `causal`, blocks whose masks a module
    around the decoder makes causal fit too."""
    from transformers import PreTrainedModel

    found = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            stacks = [child for child in module.children() if is_stack(child, causal)]
            found += [(module, tuple(stack.children())) for stack in stacks]
    if not found:
        return None, (
            "needs a transformers causal decoder: a PreTrainedModel with a list of decoder layers that take "
            "`hidden_states` and hold a causal self-attention (`is_causal`, `layer_idx`); " + without_attention(model)
        )
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module, _ in found)
        return None, f"found several stacks of decoder layers ({names}); pass the one to be changed"
    root, blocks = found[0]
    reason = unfit(model, root, blocks, causal)
    if reason:
        return None, reason
    generators = tuple(
        m for m in model.modules() if isinstance(m, PreTrainedModel) and m.can_generate() and _contains(m, root)
    )
    config = root.config
    view = DecoderView("decoder", root, blocks, windows(config, len(blocks)), generators, kinds(config, blocks, causal))
    return view, ""


def _contains(module: nn.Module, inner: nn.Module) -> bool:
    return any(child is inner for child in module.modules())
