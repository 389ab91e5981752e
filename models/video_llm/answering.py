"""Answers of a video LLM to questions about a part of a video: batched greedy generation.

Shapes: B samples, T tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mmskip
from mmskip.datasets.narration.turns import collate_narration
from mmskip.hf.calls import CACHE_NAME
from mmskip.models.common.fp32_head import head_only_at

if TYPE_CHECKING:
    from mmskip.models.video_llm.module import VideoLLM


@torch.no_grad()
def answer(model: "VideoLLM", samples: Sequence[dict[str, Any]], max_new_tokens: int) -> list[list[int]]:
    """Generate what the model says after the frames of each sample's first turn, whether or not it would speak there.

    Args:
        model: on its device; put into evaluation mode for the call.
        samples: from `mmskip.datasets.narration.turns.build_sample`; what follows "Assistant:" is ignored.
        max_new_tokens: longest answer, tokens, >= 1.

    Returns:
        The ids of each answer, without eos.

    Raises:
        ValueError: max_new_tokens < 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    was_training = model.training
    model.eval()
    batch = collate_narration([_prompt(sample) for sample in samples], 0, "left")
    mask = batch["attention_mask"].to(model.device)
    layout, features = batch["layout"].to(model.device), batch["features"].to(model.device)
    ids = batch["input_ids"].to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache: Any = None
    said: list[list[int]] = [[] for _ in samples]
    open_rows = set(range(len(samples)))
    for _ in range(max_new_tokens):
        routing = {"layout": layout} if mmskip.applied(model.llm) else {}
        rows = torch.arange(len(samples), device=model.device)
        with head_only_at(model.llm, rows, torch.full_like(rows, ids.shape[1] - 1)):
            out = model.llm(
                inputs_embeds=model.embed(ids, layout, features),
                attention_mask=mask,
                position_ids=positions,
                **{CACHE_NAME: cache},
                use_cache=True,
                **routing,
            )
        cache = getattr(out, CACHE_NAME)
        best: Tensor = out.logits.argmax(-1)
        for row, token in enumerate(best.tolist()):
            if row in open_rows and token == model.ids.eos:
                open_rows.discard(row)
            elif row in open_rows:
                said[row].append(token)
        if not open_rows:
            break
        ids, layout, features = best[:, None], layout.new_full((len(samples), 1), -1), features[:0]
        mask = torch.cat([mask, mask.new_ones(len(samples), 1)], 1)
        positions = positions[:, -1:] + 1
    model.train(was_training)
    return said


def _prompt(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample up to the beginning of its first turn's text."""
    turn = sample["turns"][0]
    cut = {key: sample[key][: turn.text[0]] for key in ("input_ids", "labels", "layout")}
    return {**sample, **cut, "features": sample["features"][: turn.frames[1]], "turns": []}
