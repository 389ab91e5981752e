"""Causal decoders of transformers whose layers tokens leave early.

Shape suffixes: B batch, T tokens, D width, V vocabulary.
"""

from typing import Any

from torch import nn

from mmskip.exits import TiedHead
from mmskip.families.hf_blocks import CACHE_ARGUMENTS, arguments_of
from mmskip.families.hf_exits import BlockState, DecoderExit, ExitRule, Run
from mmskip.swap import Change, is_swapped

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "layer_norm", "layernorm")
_SCALED = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")


def final_norm(root: nn.Module) -> nn.Module | None:
    """The norm behind the last layer of a stack that `root` holds, or None."""
    return next((getattr(root, name) for name in FINAL_NORMS if isinstance(getattr(root, name, None), nn.Module)), None)


def tied_head(view: Any) -> TiedHead:
    """The model's own output as exit head.

    Raises:
        ValueError: the output is more than a norm and a projection, or missing.
    """
    name, advice = type(view.root).__name__, "use criterion 'saturation' or 'state_norm'."
    heads = [head for head in (m.get_output_embeddings() for m in view.generators) if head is not None]
    norm = final_norm(view.root)
    if not heads or norm is None:
        raise ValueError(f"{name} has no {'norm' if heads else 'output projection'} for exit heads; {advice}")
    scaled = [key for key in _SCALED if getattr(view.config, key, None) not in (None, 1, 1.0)]
    if scaled or getattr(view.root, "project_out", None) is not None:
        told = ", ".join(scaled) or "a projection"
        raise ValueError(f"{name} changes its logits by {told}, which exit heads do not know; {advice}")
    return TiedHead(norm, heads[0])


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
    if any(is_swapped(block) for block in view.blocks):
        raise ValueError(f"the layers of {name} run another method already; remove_ it first.")
    run = Run(len(view.blocks))
    changes = []
    for index, block in enumerate(view.blocks):
        cache_name = next(name for name in CACHE_ARGUMENTS if name in arguments_of(block))
        changes.append(
            Change(f"exit.decoder.{index + 1}", block, DecoderExit, BlockState(index, rule, run, cache_name))
        )
    return changes
