"""Pictures of `evaluate.py depth`. Each draws one part of its results to a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmskip.viz.figure import save_png, subplots

_NAMES = {"attn": "attention", "mlp": "MLP", "block": "both"}


def _figure(columns: int, width: float, height: float) -> Any:
    from matplotlib.ticker import MaxNLocator

    figure, axes = subplots(1, columns, width, height)
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes[0]


def _heat(figure: Any, axis: Any, rows: Sequence[Sequence[float]], title: str, label: str, **how: Any) -> None:
    picture = axis.imshow(rows, aspect="auto", **how)
    figure.colorbar(picture, ax=axis, label=label)
    axis.set_title(title, fontsize=10)


def _tokens(axis: Any, tokens: Sequence[str]) -> None:
    names = [token.replace("\n", "\\n").strip() or "_" for token in tokens]
    axis.set_xticks(range(len(names)), [name.replace("$", "\\$") for name in names], rotation=90, fontsize=7)
    axis.set_ylabel("block")


def contributions(found: dict[str, Any], path: Path) -> None:
    """Relative norms and cosines of what attention, MLP and both add, by block."""
    figure, axes = _figure(2, 11, 4)
    titles = {"norm": "norm of what is added / norm of the stream", "cosine": "cosine of what is added with the stream"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for point, values in found["contributions"][kind].items():
            axis.plot([float("nan") if v is None else v for v in values], "o-", ms=3.5, label=_NAMES[point])
        axis.set(xlabel="block", title=title)
        axis.grid(alpha=0.3)
    axes[1].axhline(0, color="grey", lw=0.8)
    axes[0].legend()
    save_png(figure, path, dpi=None)


def effects(found: dict[str, Any], path: Path) -> None:
    """Skipped block by affected block, on the same tokens and on later ones, and the change of the output."""
    figure, axes = _figure(3, 16, 4.5)
    titles = {"present": "skipped for all tokens", "future": "skipped for the first half, measured on the second"}
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        rows = found["effects"][name]["layers"]
        seen = [[v if j > i else float("nan") for j, v in enumerate(row)] for i, row in enumerate(rows)]
        _heat(figure, axis, seen, title, "relative change of what a block adds", vmin=0, vmax=1)
        axis.set(xlabel="affected block", ylabel="skipped block")
        for kind, key, style in (("mean", "output_mean", "o-"), ("largest", "output", "x:")):
            axes[2].plot(found["effects"][name][key], style, ms=4, label=f"{name}, {kind}")
    axes[2].set(xlabel="skipped block", title="change of the output, ||p - p'||")
    axes[2].grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    save_png(figure, path, dpi=None)


def lens(found: dict[str, Any], path: Path) -> None:
    """KL to the final output and overlap of the likeliest tokens, by block."""
    figure, axes = _figure(2, 10, 4)
    axes[0].plot(found["lens"]["kl"], "o-", ms=3.5)
    axes[0].set(xlabel="after block", ylabel="nats", title="KL of the final output to the logit lens")
    axes[1].plot(found["lens"]["overlap"], "o-", ms=3.5)
    axes[1].set(xlabel="after block", ylim=(0, 1.02), title="share of the final 5 likeliest tokens found")
    for axis in axes:
        axis.grid(alpha=0.3)
    save_png(figure, path, dpi=None)


def erasure(found: dict[str, Any], path: Path) -> None:
    """Erased token by block: change of the last prediction."""
    figure, (axis,) = _figure(1, 3 + 0.28 * len(found["prompt"]), 4.5)
    title = "change of the last prediction when a token's state before a block is replaced by the mean"
    _heat(figure, axis, found["erasure"], title, "||p - p'||", vmin=0)
    _tokens(axis, found["prompt"][:-1])
    save_png(figure, path, dpi=None)


def gradients(found: dict[str, Any], path: Path) -> None:
    """Draw the contribution of each block's update of each token to the last prediction."""
    figure, (axis,) = _figure(1, 3 + 0.28 * len(found["prompt"]), 4.5)
    most = max(abs(v) for row in found["gradients"] for v in row) or 1.0
    title = "integrated gradients of the likeliest next token's log-probability"
    _heat(figure, axis, found["gradients"], title, "nats", vmin=-most, vmax=most, cmap="RdBu_r")
    _tokens(axis, found["prompt"])
    save_png(figure, path, dpi=None)


def maps(found: dict[str, Any], path: Path) -> None:
    """Error of the linear maps, depth by depth; the nearest depth of the other model is marked."""
    rows = found["maps"]
    figure, (axis,) = _figure(1, 3 + 0.4 * len(rows[0]), 2 + 0.35 * len(rows))
    _heat(figure, axis, rows, "error of linear maps on held-out tokens", "share of the variance", vmin=0, vmax=1)
    axis.plot([min(range(len(r)), key=r.__getitem__) for r in rows], range(len(rows)), "w.")
    axis.set(xlabel=f"blocks run of {Path(found['other']).name}", ylabel=f"blocks run of {Path(found['model']).name}")
    save_png(figure, path, dpi=None)
