"""Family `hf_decoder`: causal language models of transformers, found by structure."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmskip.families import TokenPolicy
from mmskip.families.hf_probe import own_attention, own_config, probe_changes
from mmskip.families.hf_stream import StreamCache
from mmskip.families.hf_subset import BlockState, LayoutGenerator, LayoutRoot, RootState, SubsetBlock, check_backend
from mmskip.swap import Change

_BLOCK_ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "position_embeddings",
    "output_attentions",
    "output_router_logits",
    "kwargs",
}


@dataclass(frozen=True)
class DecoderView:
    """A causal decoder: the module that calls the blocks (`root`), and the blocks in order.

    Attributes:
        windows: per block, the sliding window in tokens, or None for full attention.
        generators: the modules around the root that have `generate`.
    """

    family: str
    root: nn.Module
    blocks: tuple[nn.Module, ...]
    windows: tuple[int | None, ...]
    generators: tuple[nn.Module, ...]

    @property
    def config(self) -> Any:
        """The text config of the model."""
        return self.root.config

    @property
    def width(self) -> int:
        """Hidden width D."""
        return int(self.config.hidden_size)

    def site(self, index: int) -> str:
        """The site name of a block."""
        return f"block.{index}"

    @property
    def routed(self) -> tuple[int, ...]:
        """Indices of the blocks that process a subset of the tokens."""
        return tuple(index for index, block in enumerate(self.blocks) if isinstance(block, SubsetBlock))

    def attention_types(self) -> tuple[str, ...]:
        """Per block, `full` or `sliding`."""
        return tuple("full" if window is None else "sliding" for window in self.windows)

    def matrix_products(self, index: int) -> list[tuple[int, int, int]]:
        """Weight matrices of a block that every token is multiplied by: (inputs, outputs, how many).

        Raises:
            ValueError: the block has expert weights whose use per token the config does not tell.
        """
        products = []
        for module in self.blocks[index].modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                products.append((weight.shape[0], weight.shape[1], 1))  # type: ignore[union-attr]
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dim() == 3:
                    products.append((parameter.shape[1], parameter.shape[2], self._experts_per_token()))
        return products

    def _experts_per_token(self) -> int:
        count = getattr(self.config, "num_experts_per_tok", None)
        if count is None:
            raise ValueError(f"{type(self.config).__name__} does not say how many experts a token uses.")
        return int(count)

    def attention_width(self, index: int) -> int:
        """Heads times head width of the queries of a block."""
        head = getattr(self.config, "head_dim", None) or self.width // self.config.num_attention_heads
        return int(head * self.config.num_attention_heads)

    def item_bytes(self, index: int) -> int:
        """Bytes of one number of the hidden states."""
        return next(p.element_size() for p in self.blocks[index].parameters() if p.is_floating_point())

    def router_parameters(self, index: int) -> list[nn.Parameter]:
        """The weights that mmskip added to a block."""
        return [p for n, p in self.blocks[index].named_parameters() if n.startswith("mmskip_")]

    def cache_use(self, index: int, cache: Any, length: int) -> tuple[int, int, int]:
        """After a call with `length` tokens: keys a dense block attends over, KV bytes stored, KV bytes a dense block
        stores."""
        if cache is None:
            return length, 0, 0
        if isinstance(cache, StreamCache):
            return cache.use(index)
        total, window = cache.get_seq_length(index), self.windows[index]
        past = total - length if window is None else min(total - length, window - 1)
        stored = total if window is None else min(total, window - 1)
        entry = cache.layers[index]
        per_slot = 2 * entry.keys[:, :, :1].numel() * entry.keys.element_size()
        return past + length, per_slot * entry.keys.shape[-2], per_slot * stored

    def subset_changes(
        self,
        policies: Mapping[int, TokenPolicy],
        children: Mapping[int, dict[str, nn.Module]],
        attention: str | None = None,
    ) -> list[Change]:
        """The changes by which the blocks in `policies` process a subset of the tokens of every call, with the model's
        attention implementation or one of their own.

        Raises:
            ValueError: routed blocks cannot build masks for the model's attention implementation.
        """
        config = own_config(self.config, self.blocks, attention)
        check_backend(config)
        if isinstance(self.root, LayoutRoot):
            sites = ", ".join(self.site(i) for i in policies)
            raise ValueError(
                f"{sites}: this decoder routes tokens already; name all blocks in one config (keep may be a list), or "
                "remove_ the earlier one."
            )
        changes = [
            Change(
                self.site(i),
                self.blocks[i],
                SubsetBlock,
                BlockState(policy, i, self.windows[i], config, self.site(i)),
                children[i],
            )
            for i, policy in policies.items()
        ]
        if attention is not None:
            changes += [own_attention(self.blocks[i], config, self.site(i)) for i in policies]
        changes.append(Change("decoder", self.root, LayoutRoot, RootState(dict(policies))))
        changes += [Change("generate", module, LayoutGenerator, self.root) for module in self.generators]
        return changes

    def probe_changes(self, index: int, which: str) -> list[Change]:
        """The changes by which a block scores the tokens of every call by the attention that text pays to them."""
        return probe_changes(self.blocks[index], self.config, which, self.site(index))


def match(model: nn.Module, causal: bool = True) -> tuple[DecoderView | None, str]:
    """The view of `model`, or None and the reason why it does not fit. Without `causal`, blocks whose masks a module
    around the decoder makes causal fit too."""
    from transformers import PreTrainedModel

    found = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) and all(_is_block(b, causal) for b in child):
                    found.append((module, tuple(child)))
    if not found:
        return None, (
            "needs a transformers causal decoder: a PreTrainedModel with a list of decoder layers that take "
            f"`hidden_states` and hold a causal self-attention with a `layer_idx`; {type(model).__name__} has none"
        )
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module, _ in found)
        return None, f"found several stacks of decoder layers ({names}); pass the one to be changed"
    root, blocks = found[0]
    reason = _unfit(model, root, blocks)
    if reason:
        return None, reason
    generators = tuple(
        m for m in model.modules() if isinstance(m, PreTrainedModel) and m.can_generate() and _contains(m, root)
    )
    return DecoderView("hf_decoder", root, blocks, _windows(root.config, len(blocks)), generators), ""


def _contains(module: nn.Module, inner: nn.Module) -> bool:
    return any(child is inner for child in module.modules())


def _is_block(block: nn.Module, causal: bool) -> bool:
    if "hidden_states" not in inspect.signature(type(block).forward).parameters:
        return False
    return any(
        getattr(child, "is_causal", None) in (True, causal) and getattr(child, "layer_idx", None) is not None
        for child in block.children()
    )


def _unfit(model: nn.Module, root: nn.Module, blocks: Sequence[nn.Module]) -> str:
    config: Any = root.config
    name = type(root).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is part of an encoder-decoder model"
    if any(getattr(getattr(m, "config", None), "vision_config", None) is not None for m in model.modules()):
        return f"{name} stands in a vision-language model, whose frames only its own family can tell"
    if len(blocks) != config.num_hidden_layers:
        return f"{name} has {len(blocks)} decoder layers, its config says {config.num_hidden_layers}"
    types = set(getattr(config, "layer_types", None) or ())
    if not types <= {"full_attention", "sliding_attention"}:
        return f"{name} has layers of type {', '.join(sorted(types))}; only full and sliding attention can be routed"
    for owner in (root, blocks[0]):
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(owner).forward).parameters.values()):
            return f"{type(owner).__name__}.forward drops unknown keywords, so the layout cannot reach the layers"
    unknown = set(inspect.signature(type(blocks[0]).forward).parameters) - _BLOCK_ARGUMENTS - {"self"}
    if unknown:
        return f"{type(blocks[0]).__name__} takes {', '.join(sorted(unknown))}, which a subset of tokens cannot serve"
    return ""


def _windows(config: Any, count: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * count
    return tuple(window if kind == "sliding_attention" else None for kind in types[:count])
