"""Causal decoders of transformers whose layers tokens leave early.

Shape suffixes: B batch, T tokens, D width, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from mmskip.exits.heads import TiedHead
from mmskip.hf.calls import CACHE_ARGUMENTS, argument_names
from mmskip.hf.exits.block import BlockState, DecoderExit, ExitRule, Run
from mmskip.swap import Change

_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "layer_norm", "layernorm")
_SCALED = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")
_ADVICE = "use criterion 'saturation' or 'state_norm'."


def final_norm(root: nn.Module) -> nn.Module | None:
    """The norm behind the last layer of a stack that `root` holds, or None."""
    return next(
        (getattr(root, name) for name in _FINAL_NORMS if isinstance(getattr(root, name, None), nn.Module)), None
    )


def check_output(name: str, generator: nn.Module, block: nn.Module, configs: Iterable[Any]) -> None:
    """Raise ValueError if a model does more to its logits than a norm and a projection do, which exit heads would leave
    out.

    Args:
        name: of the model.
        generator: holds the output projection.
        block: a layer of the decoder.
        configs: of the model and its parts.
    """
    found = {key for key in _SCALED for config in configs if getattr(config, key, None) not in (None, 1, 1.0)}
    projection = generator.get_output_embeddings()  # type: ignore[operator]
    for holder in generator.modules():
        children = list(holder.children())
        # a head of its own, beside the decoder
        if any(child is projection for child in children) and not any(part is block for part in holder.modules()):
            found |= {type(c).__name__ for c in children if c is not projection and any(True for _ in c.parameters())}
    if found:
        raise ValueError(
            f"{name} changes its logits by {', '.join(sorted(found))}, which exit heads do not know; {_ADVICE}"
        )


def tied_head(view: Any) -> TiedHead:
    """The model's own output as exit head.

    Raises:
        ValueError: the output is more than a norm and a projection, or missing.
    """
    name = type(view.root).__name__
    generators = [module for module in view.generators if module.get_output_embeddings() is not None]
    norm = final_norm(view.root)
    if not generators or norm is None:
        raise ValueError(f"{name} has no {'norm' if generators else 'output projection'} for exit heads; {_ADVICE}")
    if getattr(view.root, "project_out", None) is not None:
        raise ValueError(f"{name} changes its logits by a projection, which exit heads do not know; {_ADVICE}")
    check_output(name, generators[0], view.blocks[0], [view.config])
    return TiedHead(norm, generators[0].get_output_embeddings())


def exit_changes(view: Any, rule: ExitRule) -> list[Change]:
    """The changes by which a decoder is left early, token by token.

    Raises:
        ValueError: layers whose entries of the cache cannot be kept for tokens that left, or that run another method.
    """
    name, other = type(view.root).__name__, sorted({kind for kind in view.kinds if kind != "full"})
    if other:
        raise ValueError(
            f"{name} has layers with {' and '.join(other)} attention; early exit serves full attention, whose cache "
            "keeps every token."
        )
    run = Run(len(view.blocks))
    changes = []
    for index, block in enumerate(view.blocks):
        cache_name = next(name for name in CACHE_ARGUMENTS if name in argument_names(block))
        changes.append(
            Change(view.site(index), block, DecoderExit, BlockState(index, rule, run, cache_name), aspect="exit")
        )
    return changes
