"""Recognise the blocks of a transformers decoder by structure: their kind, their parts, and whether they can process a
subset of the tokens exactly."""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mmskip.hf.calls import ABSENT_ARGUMENTS, CACHE_ARGUMENTS, PER_TOKEN_ARGUMENTS, argument_names
from mmskip.protocols import STATE
from mmskip.swap import base_class

_KNOWN_ARGUMENTS = {
    *CACHE_ARGUMENTS,
    *PER_TOKEN_ARGUMENTS,
    *ABSENT_ARGUMENTS,
    "self",
    "hidden_states",
    "attention_mask",
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "shared_kv_states",
    "kwargs",
}


_ATTENTION_TYPES = {"full_attention", "sliding_attention", "attention"}


def is_block(block: nn.Module, causal: bool = True) -> bool:
    """Return whether `block` is a decoder layer with a causal self-attention; without `causal`, any self-attention."""
    return "hidden_states" in argument_names(block) and attention_of(block, causal) is not None


def is_stack(blocks: nn.Module, causal: bool = True) -> bool:
    """Return whether `blocks` is a list of decoder layers, at least one of which has a (causal) self-attention."""
    return (
        isinstance(blocks, nn.ModuleList)
        and all("hidden_states" in argument_names(block) for block in blocks)
        and any(is_block(block, causal) for block in blocks)
    )


def attention_of(block: nn.Module, causal: bool = True) -> Any:
    """Return the self-attention of a decoder layer, or None."""
    for child in block.children():
        if getattr(child, "is_causal", None) in (True, causal) and getattr(child, "layer_idx", None) is not None:
            return child
    return None


def kinds(config: Any, blocks: Sequence[nn.Module], causal: bool = True) -> tuple[str, ...]:
    """Return the kind of each block: `full`, `sliding` or `state`."""
    return tuple(
        STATE if _carries_state(block, causal) else "full" if window is None else "sliding"
        for block, window in zip(blocks, windows(config, len(blocks)), strict=True)
    )


def windows(config: Any, count: int) -> tuple[int | None, ...]:
    """Return the sliding window of each block in tokens, or None for full attention."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * count
    return tuple(window if kind == "sliding_attention" else None for kind in types[:count])


def unfit(model: nn.Module, root: nn.Module, blocks: Sequence[nn.Module], causal: bool = True) -> str:
    """Return the reason why the decoder `root` cannot be served, or ""."""
    config: Any = root.config
    name = type(root).__name__
    if any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in model.modules()):
        return f"{name} is part of an encoder-decoder model"
    if any(getattr(getattr(m, "config", None), "vision_config", None) is not None for m in model.modules()):
        return f"{name} is part of a vision-language model, whose frames only its own family knows"
    if len(blocks) != config.num_hidden_layers:
        return f"{name} has {len(blocks)} decoder layers, its config says {config.num_hidden_layers}"
    routable = [i for i, kind in enumerate(kinds(config, blocks, causal)) if kind != STATE]
    if not routable:
        return (
            f"every layer of {name} carries a state from token to token beside its attention, which must see every "
            "token"
        )
    reason = _foreign_attention(config, name, routable) or _foreign_state(model, config, name)
    if reason:
        return reason
    for index in routable:
        if attention_of(blocks[index], causal).layer_idx != index:
            return f"layer {index} of {name} does not store its keys and values at place {index} of the cache"
    if not _passes_keywords(root, blocks):
        return f"{name}.forward passes no unknown keywords to its layers, so the layout cannot reach them"
    return _foreign_arguments(config, {type(blocks[i]): blocks[i] for i in routable}.values())


def _carries_state(block: nn.Module, causal: bool) -> bool:
    """Return whether a block keeps a state: it has no attention, or another child with an entry in the cache."""
    if attention_of(block, causal) is None:
        return True
    return any(
        getattr(child, "layer_idx", None) is not None and not hasattr(child, "is_causal") for child in block.children()
    )


def _foreign_attention(config: Any, name: str, routable: Sequence[int]) -> str:
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["chunked_attention"] * config.num_hidden_layers if getattr(config, "attention_chunk_size", 0) else None
    other = sorted({types[i] for i in routable} - _ATTENTION_TYPES) if types is not None else []
    if other:
        return f"{name} has layers of type {', '.join(other)}; only full and sliding attention can be routed"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"{name} has layers that attend to the keys and values of others, which would lack the tokens left out"
    return ""


def _foreign_state(model: nn.Module, config: Any, name: str) -> str:
    if getattr(config, "altup_num_inputs", 0):
        return f"{name} passes several hidden states per token (AltUp) from layer to layer"
    generators: Any = [m for m in model.modules() if hasattr(m, "_supports_default_dynamic_cache")]
    if not all(m._supports_default_dynamic_cache() for m in generators):
        return f"{name} keeps its state in its own cache, which is no DynamicCache"
    return ""


def without_attention(model: nn.Module) -> str:
    """Describe what a model has in place of decoder layers with a causal self-attention, for an error."""
    for root in model.modules():
        for stack in root.children():
            layers = list(stack.children()) if isinstance(stack, nn.ModuleList) else []
            if layers and hasattr(root, "config") and "hidden_states" in argument_names(layers[0]):
                lack = "declares no causal self-attention"
                if not _passes_keywords(root, layers):
                    lack += f", and {type(root).__name__}.forward passes no unknown keywords (the layout) to it"
                return f"{type(layers[0]).__name__} {lack}"
    return f"{type(model).__name__} has none"


def _foreign_arguments(config: Any, blocks: Any) -> str:
    for block in blocks:
        if not any(p.kind is p.VAR_KEYWORD for p in argument_names(block).values()):
            return f"{type(block).__name__}.forward drops unknown keywords, so the layout cannot reach it"
        unknown = set(argument_names(block)) - _KNOWN_ARGUMENTS
        if unknown:
            return f"{type(block).__name__} takes {', '.join(sorted(unknown))}, which a subset of tokens cannot serve"
    return ""


def _passes_keywords(root: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether the loop over the blocks in `root.forward` calls them with `**kwargs`; True if the source cannot be read:
    a block that gets no layout raises."""
    lists = {name for name, child in root.named_children() if list(child.children()) == list(blocks)}
    forward = inspect.unwrap(type(root).forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    calls = [call for loop in ast.walk(tree) if isinstance(loop, ast.For) for call in _block_calls(loop, lists)]
    return not calls or any(keyword.arg is None for call in calls for keyword in call.keywords)


def _block_calls(loop: ast.For, lists: set[str]) -> list[ast.Call]:
    """Return the calls of the loop's variables in its body, if it runs over `self.<one of lists>`."""
    if not any(isinstance(node, ast.Attribute) and node.attr in lists for node in ast.walk(loop.iter)):
        return []
    variables = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
    return [
        node
        for statement in loop.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in variables
    ]


def parts_of(block: nn.Module) -> tuple[Any, Any]:
    """Return the attention and the MLP module of a block; None for a part that is not a module."""
    attention = attention_of(block, causal=False)
    others = [c for c in block.children() if c is not attention and getattr(c, "layer_idx", None) is None]
    return attention, mlp_among(others)


def mlp_among(children: Iterable[nn.Module]) -> nn.Module | None:
    """Return the MLP among the children of a block that are no attention: the only one that holds matrices, none of
    them directly; None where no single child is one."""
    found = [
        child
        for child in children
        if not any(True for p in child._parameters.values() if p is not None and p.dim() > 1)
        and any(p.dim() > 1 for p in child.parameters())
    ]
    return found[0] if len(found) == 1 else None


def added_by(block: nn.Module) -> Any:
    """Return the module whose output a block adds for its MLP: the norm after the MLP if there is one, else the MLP."""
    names = ("post_feedforward_layernorm", "post_mlp_layernorm")
    norms = [child for name, child in block.named_children() if name in names]
    return norms[0] if len(norms) == 1 else parts_of(block)[1]


def output_projection(attention: nn.Module) -> nn.Module:
    """Return the output projection of an attention.

    Raises:
        ValueError: none has a known name.
    """
    names = ("o_proj", "out_proj", "c_proj", "dense", "wo")
    found = [child for name, child in attention.named_children() if name in names]
    if len(found) != 1:
        raise ValueError(f"{type(attention).__name__} has no output projection of a known name ({', '.join(names)}).")
    return found[0]


def returned_values(module: nn.Module) -> int:
    """Return the number of values that `forward` returns as a tuple; 0: a tensor.

    Raises:
        ValueError: the source cannot be read, or the number differs between returns.
    """
    base: Any = base_class(module)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(base.forward))))
    except (OSError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"{base.__name__} cannot be left out alone: its source, which shows what it returns, cannot be read."
        ) from error
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    counts = {len(value.elts) if isinstance(value, ast.Tuple) else 0 for value in values}
    if len(counts) != 1:
        raise ValueError(f"{base.__name__} cannot be left out alone: it returns values of different numbers.")
    return counts.pop()


_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "layer_norm", "layernorm")


def final_norm(root: nn.Module) -> nn.Module | None:
    """Return the norm after the last layer of the stack that `root` holds, or None."""
    return next(
        (getattr(root, name) for name in _FINAL_NORMS if isinstance(getattr(root, name, None), nn.Module)), None
    )
