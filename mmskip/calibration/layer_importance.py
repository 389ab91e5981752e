"""Measure how much each layer of a decoder does: one calibration pass, one table that plans and bit widths read.

The columns of the table are explained in `mmskip.importance_table`.

Shape suffixes: B batch, T tokens, D width, L blocks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mmskip import families
from mmskip.exits.voids import lac_voids
from mmskip.importance_table import COLUMNS, ImportanceTable, fingerprint
from mmskip.protocols import STATE
from mmskip.registry import applied


def importance(model: nn.Module, data: Iterable[Any]) -> ImportanceTable:
    """Measure how much each block of a decoder does, in one pass over calibration data.

    Each block runs twice per batch, the second time without its MLP, to see what attention adds. The model is not
    changed.

    Args:
        model: a transformers decoder (or VLM) without layer plans.
        data: batches: ids [B, T], or dictionaries of the model's arguments (`input_ids`, `attention_mask`, ...).

    Raises:
        ValueError: no family fits the model, a method changes which blocks run, or the data are empty.
    """
    from mmskip.hf.probes.residuals import calls_of, residuals

    view = families.find(model, ("decoder", "vlm"))
    if applied(model):
        raise ValueError(f"importance is that of the untouched model, but it carries {applied(model)}; remove_ that.")
    sums, training = _Sums(len(view.blocks)), model.training
    model.eval()
    try:
        with torch.no_grad(), residuals(view, sums.add):
            for call in calls_of(data):
                sums.begin(call)
                model(**{**call, "use_cache": False})
    finally:
        model.train(training)
    if not sums.tokens:
        raise ValueError("data is empty; expected batches of token ids.")
    return _table(view, sums)


class _Sums:
    """Running sums over tokens."""

    def __init__(self, layers: int) -> None:
        self.layers, self.tokens = layers, 0
        self.cosines: dict[str, list[float | None]] = {
            name: [0.0] * layers for name in ("drop_block", "drop_attn", "drop_mlp")
        }
        self.active = [0.0] * layers
        self._mask_BT: Tensor | None = None
        self._range_BT: tuple[Tensor, Tensor] | None = None

    def begin(self, call: Mapping[str, Any]) -> None:
        """Start a batch."""
        self._mask_BT, self._range_BT = call.get("attention_mask"), None

    def add(self, seen: Any) -> None:
        """Add what one block does to the residual stream, see `mmskip.hf.probes.residuals.Residual`."""
        x, y, index = seen.x_BTD.float(), seen.y_BTD.float(), seen.index
        real_BT = torch.ones(x.shape[:2], device=x.device) if self._mask_BT is None else self._mask_BT.to(x.device)
        real_BT = real_BT.expand(x.shape[:2]).bool()
        if index == 0:
            self.tokens += int(real_BT.sum())
        mid = None if seen.mid_BTD is None else seen.mid_BTD.float()
        pairs = {"drop_block": (x, y), "drop_attn": (x, mid), "drop_mlp": (mid, y)}
        for name, (one, other) in pairs.items():
            column = self.cosines[name]
            if one is None or other is None:
                column[index] = None
            else:
                column[index] = (column[index] or 0.0) + float(cosine_similarity(one, other, dim=-1)[real_BT].sum())
        grown_BT = y.norm(dim=-1) - x.norm(dim=-1)
        void_BT, self._range_BT = lac_voids(grown_BT, self._range_BT)
        self.active[index] += float((~void_BT)[real_BT].sum())


def lac_activity(model: nn.Module, batch: Any) -> Tensor:
    """Find the blocks that are active for each token (LAC). All blocks run, so this saves nothing by itself.

    Args:
        batch: ids [B, T], or a dictionary of the model's arguments.

    Returns:
        BoolTensor [L, B, T]; rows do not depend on each other.
    """
    from mmskip.hf.probes.residuals import calls_of, residuals

    view = families.find(model, ("decoder", "vlm"))
    active: list[Tensor] = []
    seen_range: tuple[Tensor, Tensor] | None = None

    def seen(residual: Any) -> None:
        nonlocal seen_range
        grown_BT = residual.y_BTD.float().norm(dim=-1) - residual.x_BTD.float().norm(dim=-1)
        void_BT, seen_range = lac_voids(grown_BT, seen_range)
        active.append(~void_BT)

    (call,) = calls_of([batch])
    with torch.no_grad(), residuals(view, seen):
        model(**{**call, "use_cache": False})
    return torch.stack(active)


def _table(view: Any, sums: _Sums) -> ImportanceTable:
    columns: dict[str, tuple[float | None, ...]] = {
        name: tuple(None if value is None else value / sums.tokens for value in values)
        for name, values in sums.cosines.items()
    }
    cosines = [float(value) for value in columns["drop_block"] if value is not None]
    columns["bi"] = tuple(1 - value for value in cosines)
    columns["lim"] = tuple(-value for value in cosines)
    stateful = {index for index, kind in enumerate(view.kinds) if kind == STATE}
    columns["drop_block"] = tuple(None if index in stateful else value for index, value in enumerate(cosines))
    columns["zd"] = tuple(_outlier_share(block) for block in view.blocks)
    columns["activity"] = tuple(value / sums.tokens for value in sums.active)
    ordered = {name: columns[name] for name in COLUMNS}
    return ImportanceTable(fingerprint(view), sums.layers, sums.tokens, ordered)


def _outlier_share(block: nn.Module) -> float:
    """Return the share of a block's matrix weights more than one standard deviation above their mean."""
    weights = torch.cat([p.detach().float().flatten() for p in block.parameters() if p.dim() > 1])
    return float((weights > weights.mean() + weights.std()).float().mean())
