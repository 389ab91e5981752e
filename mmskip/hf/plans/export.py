"""Write a decoder that runs by a plan as a stock checkpoint with fewer (or more) blocks."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmskip.hf.plans.block import PlannedRoot
from mmskip.swap import base_class, state_of
from mmskip.utils.files import atomic_path


def export(model: nn.Module, folder: str | os.PathLike[str], applied: Sequence[Any]) -> Path:
    """Write the visited blocks of a model with a layer plan as a checkpoint that plain transformers loads.

    Blocks that the plan repeats are stored once per visit. Before anything is written, the small model is compared with
    the planned one on random tokens.

    Args:
        model: a transformers decoder with a `LayerPlanConfig` of entire blocks in both phases, and no other method.
        folder: new, or empty.
        applied: the configs applied to `model`.

    Returns:
        The folder.

    Raises:
        ValueError: the plan leaves out parts of blocks or holds in one phase only, other methods are applied, the
            folder holds files, or the architecture depends on the place of a block in a way its config cannot express.
    """
    root = next((m for m in model.modules() if isinstance(m, PlannedRoot)), None)
    if root is None or not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers model with a LayerPlanConfig; apply_ one first.")
    if len(applied) > 1:
        raise ValueError(f"the model carries {list(applied)}; only a LayerPlanConfig can be exported.")
    plan: Any = state_of(root, PlannedRoot).plan
    if plan.phase != "both" or not all(visit.attn and visit.mlp for visit in plan.visits):
        raise ValueError(
            "only a plan of entire blocks in both phases can be exported; this one holds in "
            f"phase={plan.phase!r} or leaves out attentions or MLPs."
        )
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} holds files already; name a new folder.")
    small = _small(model, root, [visit.block for visit in plan.visits])
    _check_equal(model, small)
    with atomic_path(target) as partial:
        small.save_pretrained(str(partial))
    return target


def _small(model: PreTrainedModel, root: Any, order: list[int]) -> PreTrainedModel:
    blocks = next(
        c for c in root.children() if isinstance(c, nn.ModuleList) and len(c) == root.config.num_hidden_layers
    )
    prefix = next(name for name, module in model.named_modules() if module is blocks) + "."
    cls: Any = base_class(model)
    config = _config(model.config, len(blocks), order)
    try:
        with torch.random.fork_rng():
            small = cls._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
        small.load_state_dict(_weights(model.state_dict(), prefix, order))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{cls.__name__} cannot be built with the blocks {order}: what a block does depends on its place in "
            f"a way that this export does not know ({error})."
        ) from error
    return small.to(model.device).eval()


def _config(config: Any, count: int, order: list[int]) -> Any:
    """Copy the config for the visited blocks: every list with one entry per block is cut alike."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    for name, value in text.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == count and hasattr(text, name):
            setattr(text, name, [value[index] for index in order])
    text.num_hidden_layers = len(order)
    return small


def _weights(weights: dict[str, Tensor], prefix: str, order: list[int]) -> dict[str, Tensor]:
    found = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    for place, index in enumerate(order):
        own = f"{prefix}{index}."
        found |= {f"{prefix}{place}.{n.removeprefix(own)}": v for n, v in weights.items() if n.startswith(own)}
    return found


def _check_equal(model: PreTrainedModel, small: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings: Any = model.get_input_embeddings()
    vocabulary = int(embeddings.weight.shape[0])
    ids = torch.randint(0, vocabulary, (1, 16), generator=generator).to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        expected, found = model(ids).logits.float(), small(ids).logits.float()
    model.train(training)
    error, scale = float((expected - found).abs().max()), float(expected.abs().max())
    if not error <= (1e-4 if model.dtype == torch.float32 else 3e-2) * max(scale, 1.0):
        raise ValueError(
            f"the exported {type(small).__name__} would differ from the planned model (largest logit error "
            f"{error:.3g}): what a block does depends on its place in a way that this export does not know."
        )
