"""Pictures of the depth benchmark."""

from pathlib import Path
from typing import Any

from mmskip.utils.files import atomic_path

PARTS = ("block", "attn", "mlp", "joint")
RULES = {
    "llm_drop": {"marker": "o", "s": 30},
    "greedy": {"marker": "s", "s": 30},
    "random": {"marker": "x", "s": 22, "alpha": 0.35, "lw": 0.9},
    "random inner": {"marker": "+", "s": 26, "alpha": 0.35, "lw": 0.9},
}
"""Marks of the ways to choose the dropped parts; colours are those of `PARTS`."""
OTHERS = ("unified balanced", "unified released", "lac static", "lac per token", "ffn_skip")


def speed_of(name: str, speeds: dict[str, Any]) -> float | None:
    """The measured speed-up of a policy; of a greedy or random plan that of the plan by importance of its size."""
    for rule in ("random inner", "random", "greedy"):
        if name.startswith(f"{rule} "):
            name = name.replace(rule, "llm_drop", 1).partition(" seed ")[0]
    return speeds.get(name, {}).get("speedup")


def picture(models: dict[str, dict[str, Any]], path: Path) -> None:
    """Perplexity of a report text against measured speed, one mark per policy, one panel per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(models), 6.4), dpi=110, layout="constrained")
    for axis, (model, values) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        text = next(iter(values["quality"]["dense"]))
        speeds = values.get("speed") or values["speed_cpu"]
        marks = {f"{rule} {part}": {**RULES[rule], "color": f"C{c}"} for rule in RULES for c, part in enumerate(PARTS)}
        marks |= {kind: {"marker": "D", "s": 30, "color": f"C{5 + place}"} for place, kind in enumerate(OTHERS)}
        for kind, style in marks.items():
            points = [
                (fast, row[text])
                for name, row in values["quality"].items()
                if name.startswith(kind) and text in row and (fast := speed_of(name, speeds)) is not None
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), label=kind, **style)
        dense = values["quality"]["dense"][text]
        axis.plot(1, dense, "k*", ms=13, label="dense")
        drafts = values.get("speculation") or values.get("speculation_cpu", {})
        if any("report" in row for row in drafts.values()):
            best = max(row["speedup"] for row in drafts.values() if "report" in row)
            axis.plot(best, dense, "P", ms=10, color="tab:red", label="self-speculation")
        clock = "" if values.get("speed") else " (CPU seconds)"
        axis.set(
            xlabel=f"measured speed-up of decoding{clock}", ylabel=f"perplexity, {text}", yscale="log", title=model
        )
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7, ncols=2)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")


def bits_picture(models: dict[str, dict[str, Any]], path: Path) -> None:
    """Perplexity of bits by importance beside bits at random, by average."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(models), 4.8), dpi=110, layout="constrained")
    for axis, (model, values) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        rows = {
            name: row for name, row in values["quality"].items() if name.startswith("bits") and "refused" not in row
        }
        text = next(iter(values["quality"]["dense"]))
        groups = sorted({name.split(" average ")[0] + " average " + name.split()[3] for name in rows})
        for place, group in enumerate(groups):
            for name, row in rows.items():
                if name.startswith(group + " "):
                    column = name.removeprefix(group + " ").split()[0]
                    style = {"marker": "x", "color": "grey"} if column == "random" else {"marker": "o"}
                    known = ("bi", "lim", "drop_block", "drop_attn", "drop_mlp", "zd", "activity")
                    if column in known:
                        style["color"] = f"C{known.index(column)}"
                    axis.scatter(place, row[text], s=30, label=column if place == 0 else None, **style)
        axis.axhline(values["quality"]["dense"][text], color="k", lw=0.8, ls=":")
        axis.set_xticks(range(len(groups)), [g.removeprefix("bits ") for g in groups], rotation=20, fontsize=8)
        axis.set(ylabel=f"perplexity, {text}", yscale="log", title=model)
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axis.legend(unique.values(), unique.keys(), fontsize=7)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")
