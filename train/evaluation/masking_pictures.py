"""Pictures of a missingness report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.files import whole
from mmskip.train.metrics.missingness import FILLS, Missingness, patch_masks, patch_orders, predict


def _figure(rows: int, columns: int, width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    with whole(path) as partial:
        figure.savefig(partial, format="png")


def curves_picture(report: Missingness, path: Path) -> None:
    """Accuracy, class entropy, predicted classes and agreement against the fraction hidden, one row per order."""
    quantities = {
        "accuracy": "accuracy",
        "entropy": "class entropy (nats)",
        "classes": "classes predicted",
        "agreement": "agreement with the whole image",
    }
    figure, axes = _figure(len(report.orders), 4, 15, 3.4 * len(report.orders))
    colours = _colours(report.maskings)
    for row, (order, curves) in zip(axes, report.curves.items(), strict=True):
        for axis, (key, title) in zip(row, quantities.items(), strict=True):
            for masking, curve in curves.items():
                values = [getattr(report.clean, key), *(getattr(answers, key) for answers in curve.values())]
                thick = 2.4 if masking == report.recommended() else 1.3
                style = "-" if masking in ("layer masking", "partial conv") else "--"
                axis.plot([0, *curve], values, style, color=colours[masking], label=masking, linewidth=thick)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(f"fraction hidden ({order})", fontsize=9)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    _save(figure, path)


def _colours(maskings: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    return {masking: colormaps["tab10"](i) for i, masking in enumerate(maskings)}


def grid_picture(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    maskings: Sequence[str],
    patch: int,
    path: Path,
    count: int = 4,
) -> None:
    """Some images with half of their patches hidden: what each masking shows the network, and its answer."""
    x, labels = x[:count], labels[:count]
    size = x.shape[-1]
    m = patch_masks(patch_orders(torch.zeros_like(x[:, :1]), patch, "random"), 0.5, size, patch)
    columns = ["whole", *maskings]
    training = model.training
    model.eval()
    figure, axes = _figure(len(x), len(columns), 1.9 * len(columns), 2.25 * len(x))
    for column, masking in enumerate(columns):
        keep = torch.ones_like(m) if masking == "whole" else m
        answers = predict(model, x, keep, "black" if masking == "whole" else masking)
        shown = FILLS[masking](x, m) if masking in FILLS else _hatched(x, keep)
        for row, axis in enumerate(axes[:, column]):
            axis.imshow(shown[row].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            right = bool(answers[row] == labels[row])
            axis.set_title(_short(class_names, int(answers[row])), fontsize=8, color="green" if right else "firebrick")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[-1, column].set_xlabel(masking, fontsize=10)
    model.train(training)
    _save(figure, path)


def _short(names: Sequence[str], index: int) -> str:
    return (names[index] if index < len(names) else str(index)).split(",")[0][:18]


def _hatched(x: Tensor, m: Tensor) -> Tensor:
    """Hidden pixels as a chequered pattern: for the network they are not there."""
    size = x.shape[-1]
    cell = max(1, size // 56)
    grid = torch.arange(size) // cell
    pattern = 0.8 + 0.2 * ((grid[:, None] + grid[None]) % 2)
    return x * m + pattern * (1 - m)
