"""Router-only tuning of a tiny VLM on the embedded chat set: loss and counted compute against steps.

A base model is trained densely (configs/vlm_dense.yaml). Then its routers alone are tuned (vlm_router_only.yaml),
or routers and LoRA (vlm_mod_lora.yaml), the keep ratio annealed from 1. Beside them: the same with tokens chosen at
random at the same keep ratio, step by step (for routers alone there is then nothing to tune: mean of three draws), and
the base with blanked pictures.

Compute is that of the language model; the vision tower runs whole.

    python benchmarks/router_tuning.py

Trained models are kept under runs/router_tuning; delete a folder there to train anew. Writes docs/router_tuning.png,
and prints one JSON line.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from _measure import ROOT, emit
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure

import mmskip
from mmskip.datasets.chat import ChatData
from mmskip.files import write_json
from mmskip.methods.mod import anneal
from mmskip.models.language_model import LoRA
from mmskip.models.vlm import VLM
from mmskip.models.vlm_build import save_base
from mmskip.viz import save_png

CONFIGS = ROOT / "configs"
FOLDER = ROOT / "runs" / "router_tuning"
RANDOM = {"router": "random", "noise": 0.0}
TUNED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "router": ("vlm_router_only.yaml", {}, {}),
    "router+lora": ("vlm_mod_lora.yaml", {}, {}),
    "random+lora": ("vlm_mod_lora.yaml", RANDOM, {"trainable": "lora"}),
}
"""Recipe, and what differs from it in the method and in the model."""
COLORS = {
    "router": "#d1495b",
    "router+lora": "#2a6f97",
    "random": "#e6a5ac",
    "random+lora": "#9dbdd2",
    "base": "#22313c",
}
LABELS = {
    "router": "router alone (deep blocks)",
    "random": "random tokens there, nothing tuned",
    "router+lora": "router and LoRA (every other block)",
    "random+lora": "random tokens there, LoRA",
    "base": "base model",
}
RANDOM_SEEDS = (0, 1, 2)


def recipe(name: str, method: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file of configs/, its arguments by part; `method`: settings that replace those of its methods."""
    config = yaml.safe_load((CONFIGS / name).read_text())
    model = {**config["model"]["init_args"]}
    model["methods"] = [mmskip.MoDConfig(**(m["init_args"] | (method or {}))) for m in model.get("methods", ())]
    model["lora"] = LoRA(**model["lora"]) if model.get("lora") else None
    keys = ("max_epochs", "gradient_clip_val")
    trainer = {key: config["trainer"].get(key) for key in keys}
    return {"model": model, "data": config["data"]["init_args"], "trainer": trainer, "seed": config["seed_everything"]}


class Curve(Callback):
    """Validation results and counted compute at every validation, the first one before training."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch
        self.points: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VLM)
        self.points.append(point(pl_module, trainer.global_step, self.batch))
        print(json.dumps(self.points[-1]), flush=True)


def point(model: VLM, step: int, batch: dict[str, Any]) -> dict[str, float]:
    """The results of a validation just done, and the counted compute of a forward of `batch`."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), mmskip.trace(model.llm) as trace:
        model.loss_sums(batch)
    model.train(was_training)
    cost = mmskip.cost(model.llm, trace)
    names = ("loss", "token_accuracy", "answer_accuracy", "keep")
    return {"step": step, "compute": cost.flops / cost.dense_flops, **{name: model.results[name] for name in names}}


def trainer_of(settings: dict[str, Any], *callbacks: Callback, **more: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
        **more,
    )


def base_model() -> Path:
    """The folder of the base model, trained if it is not there yet."""
    settings = recipe("vlm_dense.yaml")
    arguments = {key: value for key, value in settings["model"].items() if key not in ("methods", "export")}
    data = ChatData(root=str(ROOT / "data"), **settings["data"])
    parts = [arguments, settings["data"], settings["trainer"], settings["seed"], data.generated.id]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
    folder = FOLDER / f"base-{key}"
    if not (folder / "config.json").exists():
        seed_everything(settings["seed"], verbose=False)
        model = VLM(**arguments)
        trainer_of(settings["trainer"], num_sanity_val_steps=0, default_root_dir=FOLDER).fit(model, data)
        save_base(model.llm, folder, data.processor)
    return folder


def evaluate(model: VLM, data: ChatData, batch: dict[str, Any], progress: float = 1.0) -> dict[str, float]:
    """Results of `model` on the validation set."""
    anneal(model.llm, progress)
    scores = torch.zeros(5, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for part in data.val_dataloader():
            scores += model._score(part)
    loss, labels, right, answers, whole = scores.tolist()
    model.results = {
        "loss": loss / labels,
        "token_accuracy": right / labels,
        "answer_accuracy": whole / answers,
        "answers": answers,
        "keep": mmskip.methods.mod.keep_in_use(model.llm),
    }
    return point(model, 0, batch)


def tune(variant: str, base: Path, every: int) -> list[dict[str, float]]:
    """The curve of a tuned variant."""
    name, method, changes = TUNED[variant]
    settings = recipe(name, method)
    seed_everything(settings["seed"], verbose=False)
    data = ChatData(root=str(ROOT / "data"), **settings["data"])
    data.prepare_data()
    model = VLM(**(settings["model"] | changes | {"vlm": str(base)}))
    curve = Curve(next(iter(data.val_dataloader())))
    runner = trainer_of(
        settings["trainer"],
        curve,
        num_sanity_val_steps=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        default_root_dir=FOLDER / variant,
    )
    runner.fit(model, data)
    return curve.points


def random_curve(base: Path, steps: list[int]) -> list[dict[str, float]]:
    """The control: at each step, the base with tokens chosen at random at that step's ratio; mean of three draws."""
    settings = recipe(TUNED["router"][0], RANDOM)
    data = ChatData(root=str(ROOT / "data"), **settings["data"])
    data.prepare_data()
    batch = next(iter(data.val_dataloader()))
    (config,), length = settings["model"]["methods"], settings["model"]["anneal_steps"]
    curves = []
    for seed in RANDOM_SEEDS:
        values = config.to_dict() | {"seed": seed}
        model = VLM(str(base), methods=[mmskip.MoDConfig.from_dict(values)])
        model.configure_model()
        found: dict[float, dict[str, float]] = {}
        for progress in sorted({min(step / length, 1.0) for step in steps}):
            found[progress] = evaluate(model, data, batch, progress)
        curves.append([found[min(step / length, 1.0)] for step in steps])
    mean = [{key: sum(c[i][key] for c in curves) / len(curves) for key in curves[0][i]} for i in range(len(steps))]
    return [point | {"step": step} for point, step in zip(mean, steps, strict=True)]


def picture(curves: dict[str, list[dict[str, float]]], base: dict[str, float]) -> Figure:
    """Loss and compute against steps."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    titles = (("loss", "validation loss"), ("compute", "counted compute, share of dense"))
    for axes, (key, label) in zip(panels, titles, strict=True):
        axes.axhline(base[key], color=COLORS["base"], linewidth=1, linestyle=":", label=LABELS["base"])
        for name, points in curves.items():
            xs, ys = [p["step"] for p in points], [p[key] for p in points]
            axes.plot(xs, ys, color=COLORS[name], label=LABELS[name], linewidth=1.8)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e8ecef", linewidth=0.7)
    panels[1].set_ylim(0, 1.05)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def measured(base: Path, pairs: int) -> dict[str, Any]:
    """Paired time of a training step of routers and LoRA against LoRA alone, beside the counted ideal."""
    from mmskip.train.savings import counted_savings, measured_speedup

    settings = recipe(TUNED["router+lora"][0])
    data = ChatData(root=str(ROOT / "data"), **settings["data"])
    data.prepare_data()
    model = VLM(**(settings["model"] | {"vlm": str(base)}))
    model.configure_model()
    batch = next(iter(data.train_dataloader()))
    ratio = measured_speedup(model, batch, pairs) if pairs else {"speedup": None}
    return {**ratio, "ideal": counted_savings(model, batch)["ideal_speedup"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TUNED, default=list(TUNED))
    parser.add_argument("--every", type=int, default=25, help="steps from one point of the curves to the next")
    parser.add_argument("--pairs", type=int, default=15, help="of a timed step; 0: not timed")
    arguments = parser.parse_args()
    folder = base_model()
    data = ChatData(root=str(ROOT / "data"), **recipe("vlm_dense.yaml")["data"])
    data.prepare_data()
    batch = next(iter(data.val_dataloader()))
    dense = VLM(str(folder))
    dense.configure_model()
    base = evaluate(dense, data, batch)
    data.blank = True
    blank = evaluate(dense, data, batch)
    curves = {}
    for name in arguments.only:
        kept = FOLDER / f"{name}-{folder.name}.json"
        if not kept.exists():
            write_json(tune(name, folder, arguments.every), kept)
        curves[name] = json.loads(kept.read_text())
    curves["random"] = random_curve(folder, [int(p["step"]) for p in next(iter(curves.values()))])
    save_png(picture(curves, base), ROOT / "docs" / "router_tuning.png")
    time = measured(folder, arguments.pairs)
    emit(
        {
            "name": "router_tuning",
            "speedup": time["speedup"],
            "ideal": time["ideal"],
            "shape": "configs/vlm_dense.yaml, vlm_router_only.yaml, vlm_mod_lora.yaml; embedded chat set, seed 7",
            "base": base,
            "blanked_base": blank,
            "starts_at_base_loss": {name: c[0]["loss"] == base["loss"] for name, c in curves.items()},
            "end": {name: c[-1] for name, c in curves.items()},
            "curves": curves,
            "time": time,
        }
    )


if __name__ == "__main__":
    main()
