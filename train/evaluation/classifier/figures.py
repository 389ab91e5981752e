"""Pictures of a missingness report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmskip
from mmskip.ops.masked import MaskedTensor
from mmskip.train.metrics.missingness import FILLS, Missingness, patch_masks, patch_orders, predict
from mmskip.viz.figure import save_png, subplots


def curves_picture(report: Missingness, path: Path) -> None:
    """Accuracy, class entropy, predicted classes and agreement against the fraction hidden, one row per order."""
    quantities = {
        "accuracy": "accuracy",
        "entropy": "class entropy (nats)",
        "classes": "classes predicted",
        "agreement": "agreement with the full image",
    }
    figure, axes = subplots(len(report.orders), 4, 15, 3.4 * len(report.orders))
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
    save_png(figure, path, dpi=None)


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
    """Some images with half of their patches hidden: the input by masking, and the answer."""
    x, labels = x[:count], labels[:count]
    size = x.shape[-1]
    m = patch_masks(patch_orders(torch.zeros_like(x[:, :1]), patch, "random"), 0.5, size, patch)
    columns = ["full image", *maskings]
    training = model.training
    model.eval()
    figure, axes = subplots(len(x), len(columns), 1.9 * len(columns), 2.25 * len(x))
    for column, masking in enumerate(columns):
        keep = torch.ones_like(m) if masking == "full image" else m
        answers = predict(model, x, keep, "black" if masking == "full image" else masking)
        shown = FILLS[masking](x, m) if masking in FILLS else _hatched(x, keep)
        for row, axis in enumerate(axes[:, column]):
            axis.imshow(shown[row].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            right = bool(answers[row] == labels[row])
            axis.set_title(_short(class_names, int(answers[row])), fontsize=8, color="green" if right else "firebrick")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[-1, column].set_xlabel(masking, fontsize=10)
    model.train(training)
    save_png(figure, path, dpi=None)


@dataclass(frozen=True)
class Stage:
    """Positions a network keeps at one resolution.

    Attributes:
        name: the last module with this resolution.
        size: (H, W).
        m: the mask [B, 1, H, W] after it; 1 = kept.
    """

    name: str
    size: tuple[int, int]
    m: Tensor


@torch.inference_mode()
def stage_masks(model: nn.Module, x: Tensor, m: Tensor) -> list[Stage]:
    """Return the mask after the last module of every resolution, the image first.

    Args:
        x: images [B, 3, H, W].
        m: the mask [B, 1, H, W].
    """
    found = {tuple(m.shape[-2:]): Stage("image", (m.shape[-2], m.shape[-1]), m)}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[-1] == 1:
                return
            size = (output.shape[-2], output.shape[-1])
            # where nothing is hidden any more the activations are plain
            mask = output.mask.m if isinstance(output, MaskedTensor) else torch.ones(len(m), 1, *size)
            if size != tuple(m.shape[-2:]) and not (isinstance(output, MaskedTensor) and output.edge is not None):
                found[size] = Stage(name, size, mask.clone())

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        with mmskip.masked(model, m):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def stages_picture(model: nn.Module, x: Tensor, patch: int, path: Path, count: int = 3, fraction: float = 0.5) -> None:
    """Draw the positions layer masking keeps at every resolution of the network, with half of the patches hidden."""
    x = x[:count]
    m = patch_masks(patch_orders(torch.zeros_like(x[:, :1]), patch, "random"), fraction, x.shape[-1], patch)
    training = model.training
    model.eval()
    stages = stage_masks(model, x, m)
    model.train(training)
    figure, axes = subplots(len(x), len(stages), 2.2 * len(stages), 2.5 * len(x))
    shown = _hatched(x, m)
    for column, stage in enumerate(stages):
        for row, axis in enumerate(axes[:, column]):
            if column:
                axis.imshow(stage.m[row, 0].numpy(), cmap="gray", vmin=-0.25, vmax=1, interpolation="nearest")
            else:
                axis.imshow(shown[row].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_title(f"{stage.m[row].mean():.0%} kept", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        name = stage.name.removeprefix("model.")
        axes[-1, column].set_xlabel(f"{name[-24:]}\n{stage.size[0]} x {stage.size[1]}", fontsize=8)
    save_png(figure, path, dpi=None)


def _short(names: Sequence[str], index: int) -> str:
    return (names[index] if index < len(names) else str(index)).split(",")[0][:18]


def _hatched(x: Tensor, m: Tensor) -> Tensor:
    """Hidden pixels as a chequered pattern: for the network they are not there."""
    size = x.shape[-1]
    cell = max(1, size // 56)
    grid = torch.arange(size) // cell
    pattern = 0.8 + 0.2 * ((grid[:, None] + grid[None]) % 2)
    return x * m + pattern * (1 - m)
