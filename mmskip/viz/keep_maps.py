"""Which vision tokens each layer keeps, drawn."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from mmskip.tracing import ForwardRecord
from mmskip.viz.figure import DENSE, INK, LINE, RAN, SKIPPED, style_axes


def kept_tokens(forward: ForwardRecord, row: int = 0) -> np.ndarray:
    """Which vision tokens each block processed.

    Args:
        forward: a record of `mmskip.trace` of a model with token routing, whose frames all have N vision tokens.
        row: of the batch.

    Returns:
        Float array [L, F, N]: 1 processed, 0 skipped, NaN in a block that is not routed (it processes all).

    Raises:
        ValueError: the forward has no layout (nothing routes tokens), or frames of different sizes.
    """
    if forward.layout is None:
        raise ValueError(
            "the trace has no layout: no method routes tokens here; apply one, e.g. mmskip.MoDConfig(keep=0.2)"
        )
    layout = forward.layout[row].cpu().numpy()
    frames, counts = np.unique(layout[layout >= 0], return_counts=True)
    if len(set(counts.tolist())) != 1:
        raise ValueError(f"row {row} needs frames of one size to be drawn, got vision tokens per frame {counts}")
    kept = np.full((len(forward.layers), len(frames), counts[0]), np.nan)
    for index, layer in enumerate(forward.layers):
        if layer.kept is not None:
            kept[index] = layer.kept[row].cpu().numpy()[layout >= 0].reshape(kept.shape[1:])
    return kept


def keep_map(forward: ForwardRecord, row: int = 0, max_frames: int = 24) -> Figure:
    """Heat map over blocks and frames: which vision tokens ran where.

    Each column of a frame is one of its vision tokens, the first one CLS if the tower has it.

    Args:
        forward: see `kept_tokens`.
        row: of the batch.
        max_frames: frames drawn, from the first one.

    Returns:
        A figure; `save_png` writes it.
    """
    kept = kept_tokens(forward, row)[:, :max_frames]
    blocks, frames, tokens = kept.shape
    cells = np.where(np.isnan(kept), 2, kept).reshape(blocks, frames * tokens)
    figure = Figure(figsize=(max(7.0, 0.42 * frames + 1.6), 1.7 + 0.27 * blocks), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        cells, cmap=ListedColormap([SKIPPED, RAN, DENSE]), vmin=0, vmax=2, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks((np.arange(frames) + 0.5) * tokens - 0.5, [str(index) for index in range(frames)])
    axes.set_yticks(range(blocks), [layer.site for layer in forward.layers])
    for edge in range(1, frames):
        axes.axvline(edge * tokens - 0.5, color="white", linewidth=1.2)
    for edge in range(1, blocks):
        axes.axhline(edge - 0.5, color="white", linewidth=1.2)
    axes.set_xlabel(f"frame, {tokens} vision tokens each")
    style_axes(axes)
    axes.tick_params(length=0)
    routed = ~np.isnan(kept).all(axis=(1, 2))
    share = float(np.nanmean(kept[routed])) if routed.any() else 1.0
    axes.set_title(
        f"{int(routed.sum())} of {blocks} blocks are routed and process {share:.0%} of the vision tokens",
        loc="left",
        fontsize=10,
        color=INK,
    )
    for color, label in ((RAN, "processed"), (SKIPPED, "skipped"), (DENSE, "dense block")):
        axes.scatter([], [], marker="s", s=60, color=color, edgecolor=LINE, linewidth=0.5, label=label)
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    return figure


def dropped_patches(frames: np.ndarray, forward: ForwardRecord, row: int = 0, columns: int = 8) -> Figure:
    """Return the frames themselves: the more routed blocks skip a patch, the more it fades to grey.

    Args:
        frames: uint8 [F, H, W, 3], as the vision tower saw them; the first F frames of the row.
        forward: see `kept_tokens`; N must be G * G, or 1 + G * G with CLS first.
        row: of the batch.
        columns: frames side by side.

    Raises:
        ValueError: N is not a grid.
    """
    kept = kept_tokens(forward, row)
    share = np.nanmean(kept[~np.isnan(kept).all(axis=(1, 2))], axis=0)[: len(frames)]
    frames = frames[: len(share)]
    tokens = share.shape[1]
    side = round(np.sqrt(tokens - 1)) if round(np.sqrt(tokens)) ** 2 != tokens else round(np.sqrt(tokens))
    if tokens not in (side**2, side**2 + 1):
        raise ValueError(f"{tokens} vision tokens per frame are no square grid, with or without CLS")
    grids = share[:, tokens - side**2 :].reshape(-1, side, side)
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    figure = Figure(figsize=(1.45 * columns, 1.62 * rows + 0.35), layout="constrained")
    for index, (frame, grid) in enumerate(zip(frames, grids, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(_faded(frame, grid), interpolation="nearest")
        axes.set_title(str(index), fontsize=7, pad=2, color=INK)
        axes.set_axis_off()
    figure.suptitle("Patches fade with the share of routed blocks that skip them", fontsize=9, color=INK)
    return figure


def _faded(frame: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """`frame` [H, W, 3] with each cell of `grid` [G, G] as vivid as its value in [0, 1]."""
    height, width = frame.shape[:2]
    cells = grid[np.arange(height)[:, None] * grid.shape[0] // height, np.arange(width)[None] * grid.shape[1] // width]
    grey = 0.35 * frame.mean(axis=2, keepdims=True) + 0.65 * 200
    vivid = cells[..., None]
    return (vivid * frame + (1 - vivid) * grey).round().astype(np.uint8)
