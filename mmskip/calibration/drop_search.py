"""Measure which parts of a decoder to leave out: one after another, each time the one whose absence costs least beside
those that are gone already.

Scores of single blocks, as LLM-Drop sorts them, do not know that of two blocks with the same job either may go, but not
both. Measuring again after every choice does (SLEB, arXiv 2402.09025, here for attentions and MLPs too). It runs the
data once per candidate and choice.

Shape suffixes: B batch, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmskip import families
from mmskip.config import check_choice, check_count
from mmskip.importance_table import fingerprint
from mmskip.methods.layer_plan import KINDS, LayerPlanConfig, resolve
from mmskip.registry import applied, apply_, remove_
from mmskip.utils.deprecated import renamed_arguments
from mmskip.utils.labels import IGNORE


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


@renamed_arguments(kv="cache_policy")
def drop_order(
    model: nn.Module,
    data: Iterable[Any],
    n: int,
    kind: str = "block",
    phase: str = "both",
    cache_policy: str = "skip",
) -> list[Drop]:
    """Choose `n` parts to leave out, one after another. The first m of them are the choice for m. The model does not
    change.

    Args:
        model: a transformers decoder (or VLM) without methods.
        data: batches of ids [B, T], or dictionaries of the model's arguments; padding by `attention_mask` is not
            predicted, unless `labels` [B, T] are given (needed with pictures and with `inputs_embeds`). Losses are
            those of the plan in the prompt.
        n: how many, >= 0.
        kind: `"block"`, `"attn"`, `"mlp"` or `"joint"` (attentions and MLPs together).
        phase, cache_policy: of the plan, see `LayerPlanConfig`; parts that it could not leave out are no candidates.

    Raises:
        ValueError: a setting is out of range, a method is applied to the model, the data are empty, or fewer than `n`
            parts can be left out.
    """
    from mmskip.hf.probes.residuals import calls_of

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
    with _evaluating(model):
        while len(chosen) < n:
            tried, refusal = [], None
            for part, index in left:
                config = plan_of([*chosen, Drop(part, index, 0.0)], phase, cache_policy)
                refused = _refusal(view, config)
                refusal = refused or refusal
                if refused is None:
                    tried.append(Drop(part, index, _loss_without(model, batches, config)))
            if not tried:
                raise ValueError(f"n is {n}, but only {len(chosen)} of kind {kind!r} can be left out: {refusal}")
            chosen.append(min(tried, key=lambda drop: (drop.loss, -drop.index)))
            left.remove((chosen[-1].part, chosen[-1].index))
    return chosen


@renamed_arguments(kv="cache_policy")
def greedy_drops(
    model: nn.Module,
    data: Iterable[Any],
    n: int,
    kind: str = "block",
    phase: str = "both",
    cache_policy: str = "skip",
) -> LayerPlanConfig:
    """Build the plan that leaves out the `n` parts of `drop_order`: as many passes over the data as there are
    candidates, `n` times.

    Args:
        model, data, n, kind, phase, cache_policy: see `drop_order`.

    Returns:
        The plan, for this model.

    Raises:
        ValueError: as `drop_order`.
    """
    view = families.find(model, ("decoder", "vlm"))
    chosen = drop_order(model, data, n, kind, phase, cache_policy)
    return plan_of(chosen, phase, cache_policy, layers=len(view.blocks), model_fingerprint=fingerprint(view))


@renamed_arguments(kv="cache_policy")
def plan_of(drops: Sequence[Drop], phase: str = "both", cache_policy: str = "skip", **checks: Any) -> LayerPlanConfig:
    """Build the plan that leaves out some choices; `checks` are its `layers` and `model_fingerprint`."""
    lost = {part: tuple(sorted(d.index for d in drops if d.part == part)) for part in ("block", "attn", "mlp")}
    return LayerPlanConfig(lost["block"], lost["attn"], lost["mlp"], phase=phase, cache_policy=cache_policy, **checks)


def _refusal(view: Any, config: LayerPlanConfig) -> ValueError | None:
    """Return the reason why the model cannot run a plan, or None."""
    from mmskip.hf.plans.block import plan_changes

    try:
        plan_changes(view, resolve(config, view))
    except ValueError as error:
        return error
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _loss_without(model: nn.Module, batches: Sequence[dict[str, Any]], config: LayerPlanConfig) -> float:
    # only the prompt runs here, in which a plan for decoding would leave out nothing
    apply_(model, replace(config, phase="both"))
    try:
        return _loss(model, batches)
    finally:
        remove_(model)


@torch.no_grad()
def _loss(model: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Measure the mean loss of the next tokens, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        call = {**batch, "use_cache": False}
        given_BT = call.pop("labels", None)
        labels_BT = _labels(call) if given_BT is None else given_BT
        logits = model(**call).logits[:, :-1].float()
        targets = labels_BT[:, 1:].to(logits.device).flatten()
        total += float(cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"))
        count += int((targets != IGNORE).sum())
    if not count:
        raise ValueError("data has no token to predict; expected rows of at least two real tokens.")
    return total / count


def _labels(call: dict[str, Any]) -> Tensor:
    """Make labels [B, T] of the ids: every real token but the first of a row, which nothing predicts."""
    if "input_ids" not in call or any(name.startswith("pixel_values") for name in call):
        raise ValueError(
            f"a batch has {', '.join(name for name in call if name != 'use_cache')}; expected labels [B, T] with it, "
            "for the ids do not tell which tokens are text to be predicted."
        )
    labels_BT: Tensor = call["input_ids"]
    if call.get("attention_mask") is None:
        return labels_BT
    real_BT = call["attention_mask"].bool()
    return labels_BT.masked_fill(~(real_BT & real_BT.roll(1, 1)), IGNORE)
