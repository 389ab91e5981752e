"""The importance table: how much each layer of a decoder does, one number per block and column.

Columns, measured on the residual stream x -> x' (after attention) -> y (after the MLP), means over the real tokens of
the calibration data:

- `bi`: block influence 1 - cos(x, y) (ShortGPT, arXiv 2403.03853)
- `lim`: -cos(x, y), the layer input modification of layer-wise quantization (arXiv 2406.17415)
- `drop_block`, `drop_attn`, `drop_mlp`: cos(x, y), cos(x, x'), cos(x', y): LLM-Drop (arXiv 2406.15786) drops the
  highest first. None where a plan cannot leave that out
- `zd`: share of the block's weights more than one standard deviation above their mean (2406.17415; lower is more
  important)
- `activity`: share of tokens for which the block is no void of LAC (arXiv 2505.14467)
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmskip.utils.files import atomic_path, write_json

COLUMNS = ("bi", "lim", "drop_block", "drop_attn", "drop_mlp", "zd", "activity")
_FORMAT = 1


def fingerprint(view: Any) -> str:
    """Name the architecture of a model, by which a table, plan or threshold knows what it was made for."""
    config = view.config
    return f"{config.model_type}, {len(view.blocks)} blocks, width {view.width}, vocabulary {config.vocab_size}"


@dataclass(frozen=True)
class ImportanceTable:
    """Result of `mmskip.importance`.

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
        """Sort the blocks by a column, ties to the lower index; those without a value are left out.

        Raises:
            ValueError: no such column.
        """
        if column not in self.columns:
            raise ValueError(f"column is {column!r}; this table has {', '.join(self.columns)}.")
        found = [(value, i) for i, value in enumerate(self.columns[column]) if value is not None]
        return tuple(i for _, i in sorted(found, key=lambda item: (-item[0] if descending else item[0], item[1])))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` reverses it."""
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
        """Build a table from what `to_dict` returned.

        Raises:
            ValueError: anything else.
        """
        try:
            columns = {name: tuple(column) for name, column in values["columns"].items()}
            table = cls(values["model"], values["layers"], values["tokens"], columns)
            fits = values["format"] == _FORMAT and all(len(column) == table.layers for column in columns.values())
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an importance table ({error!r}).") from error
        if not fits:
            raise ValueError("not an importance table of this format, with one value per block in each column.")
        return table

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON, atomically."""
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
        with atomic_path(Path(path)) as partial:
            FigureCanvasAgg(figure).print_png(str(partial))
        return Path(path)
