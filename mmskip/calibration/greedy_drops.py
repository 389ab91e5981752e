"""Which parts of a decoder to leave out, told by leaving them out: one after another, each time the one whose absence
costs least beside those that are gone already.

Scores of single blocks, as LLM-Drop sorts them, do not know that of two blocks which do one job either may go, but not
both. Measuring again after every choice does (SLEB, arXiv 2402.09025, here for attentions and MLPs too). It runs the
data once for every candidate of every choice.

Shape suffixes: B batch, T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mmskip import families
from mmskip.config import check_choice, check_count
from mmskip.hf.plans.block import plan_changes
from mmskip.hf.probes.residuals import calls_of
from mmskip.methods.layer_plan import KINDS, LayerPlanConfig, resolve
from mmskip.registry import applied, apply_, remove_

IGNORED = -100
"""Label of a token that is not predicted."""


@dataclass(frozen=True)
class Drop:
    """One choice.

    Attributes:
        part: `"block"`, `"attn"` or `"mlp"`.
        index: of the block.
        loss: mean loss per token, in nats, without this part and those chosen before it.
    """

    part: str
    index: int
    loss: float


def greedy_drops(
    model: nn.Module, data: Iterable[Any], n: int, kind: str = "block", phase: str = "both", kv: str = "compact"
) -> list[Drop]:
    """The first `n` parts to leave out, in the order they are chosen in: `LayerPlanConfig.greedy` makes a plan of them,
    and the first m of them are what it would choose for m. The model is left as it was.

    Args:
        model: a transformers decoder (or VLM) that nothing is applied to.
        data: batches of ids [B, T], or dictionaries of the model's arguments; what `attention_mask` leaves out is not
            predicted, `labels` [B, T] say otherwise (needed with pictures and with `inputs_embeds`). Losses are those
            of the plan in the prompt.
        n: how many.
        kind: `"block"`, `"attn"`, `"mlp"` or `"joint"` (attentions and MLPs together).
        phase, kv: of the plan: parts that it could not leave out are no candidates.

    Raises:
        ValueError: a setting is out of range, something is applied to the model, the data are empty, or fewer than `n`
            parts can be left out.
    """
    check_choice("kind", kind, KINDS)
    check_count("n", n)
    view = families.find(model, ("decoder", "vlm"))
    if applied(model):
        raise ValueError(f"drops are chosen on the untouched model, but it carries {applied(model)}; remove_ that.")
    batches = list(calls_of(data))
    if not batches:
        raise ValueError("data is empty; expected batches of token ids.")
    parts = ("attn", "mlp") if kind == "joint" else (kind,)
    left = [(part, index) for part in parts for index in range(len(view.blocks))]
    chosen: list[Drop] = []
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        while len(chosen) < n:
            tried, refusal = [], None
            for part, index in left:
                config = plan_of([*chosen, Drop(part, index, 0.0)], phase, kv)
                try:
                    plan_changes(view, resolve(config, view))
                except ValueError as error:
                    refusal = error
                    continue
                tried.append(Drop(part, index, _loss_without(model, batches, config)))
            if not tried:
                raise ValueError(f"n is {n}, but only {len(chosen)} of kind {kind!r} can be left out: {refusal}")
            chosen.append(min(tried, key=lambda drop: (drop.loss, -drop.index)))
            left.remove((chosen[-1].part, chosen[-1].index))
    finally:
        for module, mode in training:
            module.training = mode
    return chosen


def plan_of(drops: Sequence[Drop], phase: str = "both", kv: str = "compact", **checks: Any) -> LayerPlanConfig:
    """The plan that leaves out some choices; `checks` are `layers` and `made_for` of the config."""
    lost = {part: tuple(sorted(d.index for d in drops if d.part == part)) for part in ("block", "attn", "mlp")}
    return LayerPlanConfig(lost["block"], lost["attn"], lost["mlp"], phase=phase, kv=kv, **checks)


def _loss_without(model: nn.Module, batches: Sequence[dict[str, Any]], config: LayerPlanConfig) -> float:
    # the prompt alone runs here, in which a plan for decoding would leave out nothing
    apply_(model, replace(config, phase="both"))
    try:
        return _loss(model, batches)
    finally:
        remove_(model)


@torch.no_grad()
def _loss(model: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Mean loss of the next tokens, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        call = {**batch, "use_cache": False}
        labels_BT = call.pop("labels", None)
        if labels_BT is None:
            if "input_ids" not in call or any(name.startswith("pixel_values") for name in call):
                raise ValueError(
                    f"a batch has {', '.join(batch)}; expected labels [B, T] with it, for the ids do not tell which "
                    "tokens are text to be predicted."
                )
            labels_BT = call["input_ids"]
            if call.get("attention_mask") is not None:
                real_BT = call["attention_mask"].bool()
                follows_BT = real_BT & real_BT.roll(1, 1)  # nothing predicts the first real token of a row
                labels_BT = labels_BT.masked_fill(~follows_BT, IGNORED)
        logits = model(**call).logits[:, :-1].float()
        targets = labels_BT[:, 1:].to(logits.device).flatten()
        total += float(cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"))
        count += int((targets != IGNORED).sum())
    if not count:
        raise ValueError("data has no token to predict; expected rows of at least two real tokens.")
    return total / count
