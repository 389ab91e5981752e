"""How much each layer of a decoder does: one calibration pass, one table that plans and bit widths are read from.

Columns, all per block, measured on the residual stream x -> x' (after attention) -> y (after the MLP), means over the
real tokens of the calibration data:

- `bi`: block influence 1 - cos(x, y) (ShortGPT, arXiv 2403.03853)
- `lim`: -cos(x, y), the layer input modification of layer-wise quantization (arXiv 2406.17415)
- `drop_block`, `drop_attn`, `drop_mlp`: cos(x, y), cos(x, x'), cos(x', y): LLM-Drop (arXiv 2406.15786) drops the
  highest first. None where a plan cannot leave that out
- `zd`: share of the block's weights more than one standard deviation above their mean (2406.17415; lower is more
  important there)
- `activity`: share of tokens for which the block is no void of LAC (arXiv 2505.14467)

Shape suffixes: B batch, T tokens, D width, L blocks.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mmskip import families
from mmskip.protocols import STATE
from mmskip.utils.files import whole, write_json

if TYPE_CHECKING:
    from mmskip.hf.probes.residuals import Residual

LAC_ALPHA = 0.8
"""Of the LAC threshold, as published."""
COLUMNS = ("bi", "lim", "drop_block", "drop_attn", "drop_mlp", "zd", "activity")
_FORMAT = 1


def fingerprint(view: Any) -> str:
    """Names the architecture a table was made for."""
    config = view.config
    return f"{config.model_type}, {len(view.blocks)} blocks, width {view.width}, vocabulary {config.vocab_size}"


@dataclass(frozen=True)
class ImportanceTable:
    """What `importance` measured.

    Attributes:
        model: the architecture, see `fingerprint`.
        layers: number of blocks L.
        tokens: real tokens of the calibration data.
        columns: by name (`COLUMNS`), one number or None per block.
    """

    model: str
    layers: int
    tokens: int
    columns: dict[str, tuple[float | None, ...]]

    def ranking(self, column: str, descending: bool = True) -> tuple[int, ...]:
        """Blocks by a column, ties to the lower index; those without a value are left out.

        Raises:
            ValueError: no such column.
        """
        if column not in self.columns:
            raise ValueError(f"column is {column!r}; this table has {', '.join(self.columns)}.")
        found = [(value, i) for i, value in enumerate(self.columns[column]) if value is not None]
        return tuple(i for _, i in sorted(found, key=lambda item: (-item[0] if descending else item[0], item[1])))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reverses it."""
        columns = {name: list(values) for name, values in self.columns.items()}
        return {
            "format": _FORMAT,
            "model": self.model,
            "layers": self.layers,
            "tokens": self.tokens,
            "columns": columns,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImportanceTable":
        """Raises ValueError for what `to_dict` did not write."""
        try:
            columns = {name: tuple(column) for name, column in values["columns"].items()}
            table = cls(values["model"], values["layers"], values["tokens"], columns)
            fits = values["format"] == _FORMAT and all(len(column) == table.layers for column in columns.values())
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no importance table ({error!r}).") from error
        if not fits:
            raise ValueError("this is no importance table of this format, with one value per block in each column.")
        return table

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON, whole."""
        return write_json(self.to_dict(), Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ImportanceTable":
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def __str__(self) -> str:
        names = list(self.columns)
        lines = [f"{self.model}; {self.tokens} tokens", "block " + " ".join(f"{name:>10}" for name in names)]
        for index in range(self.layers):
            cells = (self.columns[name][index] for name in names)
            line = " ".join(f"{'-' if cell is None else f'{cell:.4f}':>10}" for cell in cells)
            lines.append(f"{index:5d} {line}")
        return "\n".join(lines)

    def picture(self, path: str | os.PathLike[str]) -> Path:
        """Draw the table as a heat map, each column scaled to its own range; PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        values = torch.tensor([[float("nan") if v is None else v for v in c] for c in self.columns.values()])
        low = torch.nan_to_num(values, nan=torch.inf).amin(1, keepdim=True)
        high = torch.nan_to_num(values, nan=-torch.inf).amax(1, keepdim=True)
        figure = Figure(figsize=(2 + 0.45 * self.layers, 4), layout="constrained")
        axes = figure.subplots()
        axes.imshow(((values - low) / (high - low).clamp(min=1e-12)).numpy(), aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(self.columns)), list(self.columns))
        axes.set_xlabel("block")
        axes.set_title(f"{self.model}: each row from its lowest (dark) to its highest value", fontsize=8)
        with whole(Path(path)) as partial:
            FigureCanvasAgg(figure).print_png(str(partial))
        return Path(path)


def importance(model: nn.Module, data: Iterable[Any]) -> ImportanceTable:
    """Measure how much each block of a decoder does, in one pass over calibration data.

    Each block runs twice per batch, the second time without its MLP, to tell what attention adds. The model is not
    changed.

    Args:
        model: a transformers decoder (or VLM) without layer plans.
        data: batches: ids [B, T], or dictionaries of the model's arguments (`input_ids`, `attention_mask`, ...).

    Raises:
        ValueError: no family fits the model, a method changes which blocks run, or the data are empty.
    """
    from mmskip.hf.probes.residuals import calls_of, residuals
    from mmskip.registry import applied

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
        self._mask_BT, self._range_BT = call.get("attention_mask"), None

    def add(self, seen: "Residual") -> None:
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


def lac_voids(
    grown_BT: Tensor, range_BT: tuple[Tensor, Tensor] | None, alpha: float = LAC_ALPHA
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The voids of LAC at one block: tokens whose norm grew by less than alpha times the range of the growths at the
    blocks before. At the first block there is none.

    Args:
        grown_BT: growth of the norm of each token.
        range_BT: largest and smallest growth at the blocks before; None at the first one.

    Returns:
        BoolTensor [B, T], and the range for the next block.
    """
    if range_BT is None:
        return torch.zeros_like(grown_BT, dtype=torch.bool), (grown_BT, grown_BT)
    high_BT, low_BT = range_BT
    void_BT = grown_BT < alpha * (high_BT - low_BT)
    return void_BT, (torch.maximum(high_BT, grown_BT), torch.minimum(low_BT, grown_BT))


def lac_activity(model: nn.Module, batch: Any) -> Tensor:
    """Which blocks are active for each token of each sample (LAC): BoolTensor [L, B, T]; rows do not depend on each
    other. All blocks run, so this saves nothing by itself.

    Args:
        batch: ids [B, T], or a dictionary of the model's arguments.
    """
    from mmskip.hf.probes.residuals import calls_of, residuals

    view = families.find(model, ("decoder", "vlm"))
    active: list[Tensor] = []
    seen_range: tuple[Tensor, Tensor] | None = None

    def seen(residual: "Residual") -> None:
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
    """Share of the weights of the matrices of a block that lie more than one standard deviation above their mean."""
    weights = torch.cat([p.detach().float().flatten() for p in block.parameters() if p.dim() > 1])
    return float((weights > weights.mean() + weights.std()).float().mean())
