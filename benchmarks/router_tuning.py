"""Router-only tuning of a tiny VLM on the embedded chat set: loss and counted compute against steps.

For each seed a base model is trained densely (configs/vlm_dense.yaml) on a set drawn with that seed. Its routers are
taught the attention of the base, and its keep ratios are chosen on samples that the report never sees: along `LADDER`,
the last before one that may cost more than `ALLOWED` of the loss. Then the routers alone are tuned at these
(vlm_router_only.yaml), or routers and LoRA at a smaller keep ratio (vlm_mod_lora.yaml). Beside each, at the same keep
ratios: random tokens, the same weights trained as long. With nothing trained: fitted, random (mean of three draws),
evenly spaced and largest-norm tokens, and tokens dropped by the attention they receive (FastV); and the base with
blanked pictures. Losses are those of the test split.

Compute is that of the language model; the vision tower runs in full.

    python benchmarks/router_tuning.py            # report: test split of other seeds
    python benchmarks/router_tuning.py --search   # of the router, on the base of the search seed

Trained models are kept under runs/router_tuning; delete them to train anew. The report writes
docs/router_tuning.png; both print one JSON line.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from transformers import AutoConfig

import mmskip
from common.measure import ROOT, emit
from mmskip.calibration import fit_routers
from mmskip.datasets.chat.module import ChatData
from mmskip.datasets.synthetic.chat import SceneChatConfig
from mmskip.methods.mixture_of_depths import anneal, find_policies
from mmskip.models.common.pretrained import LoRA
from mmskip.models.vlm.build import save_base
from mmskip.models.vlm.module import VLM, answering_tokens, inputs_of
from mmskip.tokens.router import LEARNED
from mmskip.utils.command import CommandParser
from mmskip.utils.results import made_once
from mmskip.viz.figure import save_png

CONFIGS = ROOT / "configs"
FOLDER = ROOT / "runs" / "router_tuning"
SEARCH_SEED, SEEDS = 100, (5, 6)  # seeds 1 to 4 were seen with earlier recipes
SEARCHED = ((100, "val"), (100, "test"), (101, "test"), (102, "test"))
"""Sets, by seed and split, on which settings are chosen for the base of the search seed."""
ROUTERS = (("linear", 32), ("mlp", 16), ("mlp", 32))
KEEPS = ((0.85, 0.85), (0.9, 0.6), (0.8, 0.6), (0.9, 0.5))
"""Routers with their hidden units, and keep ratios of the two routed blocks, that the search tries."""
LADDER = ((1.0, 0.8), (1.0, 0.6), (0.9, 0.6), (0.8, 0.6), (0.8, 0.4), (0.6, 0.4))
"""Keep ratios from which those of a base are chosen, in this order."""
SIZES = {"val": 600, "test": 1000}
RANDOM = {"router": "random", "gate": "separate", "noise": 0.0}
TUNED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "router": ("vlm_router_only.yaml", {}, {}),
    "random tuned": ("vlm_router_only.yaml", RANDOM, {"router_fit": 0}),
    "router+lora": ("vlm_mod_lora.yaml", {}, {}),
    "random+lora": ("vlm_mod_lora.yaml", RANDOM, {"router_fit": 0}),
}
"""Recipe, and changes of the method and of the model."""
COLORS = {
    "router": "#d1495b",
    "random tuned": "#e6a5ac",
    "router+lora": "#2a6f97",
    "random+lora": "#9dbdd2",
    "base": "#22313c",
}
LABELS = {
    "router": "router alone",
    "random tuned": "random tokens, gates tuned",
    "router+lora": "router and LoRA (keep 0.5)",
    "random+lora": "random tokens and LoRA (keep 0.5)",
    "base": "base model",
}
DRAWS = (0, 1, 2)
ALLOWED = 0.005  # of the loss, with 95 % confidence, in the choice of the keep ratios


def recipe(name: str, seed: int, method: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file of configs/, its arguments by part; `method`: settings that replace those of its methods."""
    config = yaml.safe_load((CONFIGS / name).read_text())
    model = {**config["model"]["init_args"]}
    model["methods"] = [mmskip.MoDConfig(**(m["init_args"] | (method or {}))) for m in model.get("methods", ())]
    model["lora"] = LoRA(**model["lora"]) if model.get("lora") else None
    keys = ("max_epochs", "gradient_clip_val")
    trainer = {key: config["trainer"].get(key) for key in keys}
    return {"model": model, "data": config["data"]["init_args"], "trainer": trainer, "seed": seed}


def data_of(seed: int, split: str) -> ChatData:
    """The embedded set of a seed, whose validation is that of `split`."""
    settings = recipe("vlm_dense.yaml", seed)["data"]
    data = ChatData(root=str(ROOT / "data"), generated=SceneChatConfig(seed=seed, **SIZES), **settings)
    data.prepare_data()
    if split == "test":
        data.val_dataloader = data.test_dataloader  # type: ignore[method-assign]
    return data


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
    names = ("loss", "token_accuracy", "answer_accuracy", "keep")
    return {"step": step, "compute": compute(model, batch), **{name: model.results[name] for name in names}}


def compute(model: VLM, batch: dict[str, Any]) -> float:
    """Counted FLOPs of a forward of `batch`, as a share of dense."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), mmskip.trace(model.llm) as trace:
        model.loss_sums(batch)
    model.train(was_training)
    cost = mmskip.cost(model.llm, trace)
    return cost.flops / cost.dense_flops


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


def base_model(seed: int) -> Path:
    """The folder of the base model of a seed, trained if it is not there yet."""
    settings = recipe("vlm_dense.yaml", seed)
    arguments = {key: value for key, value in settings["model"].items() if key not in ("methods", "export")}
    data = data_of(seed, "val")
    parts = [arguments, settings["data"], settings["trainer"], seed, data.generated.id]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
    folder = FOLDER / f"base-{seed}-{key}"
    if not (folder / "config.json").exists():
        seed_everything(seed, verbose=False)
        model = VLM(**arguments)
        trainer_of(settings["trainer"], num_sanity_val_steps=0, default_root_dir=FOLDER).fit(model, data)
        save_base(model.llm, folder, data.processor)
    return folder


def conversation_losses(model: VLM, data: ChatData) -> list[float]:
    """Summed loss of each conversation of the validation set, at the method's keep ratio."""
    anneal(model.llm, 1.0)
    model.eval()
    sums: list[float] = []
    with torch.no_grad():
        for part in data.val_dataloader():
            positions, losses, _ = model._losses(part)
            sums += torch.zeros(len(part["labels"])).index_add(0, positions.rows, losses).tolist()
    return sums


def excess(losses: list[float], base: list[float]) -> dict[str, float]:
    """Loss over that of the base, relative, and its standard error from the paired differences of conversations."""
    differences = torch.tensor(losses, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    return {
        "excess": float(differences.sum() / sum(base)),
        "excess_se": float(differences.std() * len(base) ** 0.5 / sum(base)),
    }


def evaluate(model: VLM, data: ChatData, batch: dict[str, Any]) -> dict[str, float]:
    """Results of `model` on the validation set, at the method's keep ratio."""
    anneal(model.llm, 1.0)
    scores = torch.zeros(5, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for part in data.val_dataloader():
            scores += model._score(part)
    loss, labels, right, answers, exact = scores.tolist()
    model.results = {
        "loss": loss / labels,
        "token_accuracy": right / labels,
        "answer_accuracy": exact / answers,
        "answers": answers,
        "keep": mmskip.methods.mixture_of_depths.read_keep(model.llm),
    }
    return point(model, 0, batch)


def settings_of(variant: str, keep: tuple[float, ...]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Recipe and changes of a tuned variant; router-only ones take the chosen keep ratios."""
    name, method, changes = TUNED[variant]
    return name, method | ({"keep": keep} if name == TUNED["router"][0] else {}), changes


def tune(variant: str, base: Path, seed: int, split: str, every: int, keep: tuple[float, ...]) -> dict[str, Any]:
    """The curve of a tuned variant, and its loss by conversation at the end."""
    name, method, changes = settings_of(variant, keep)
    settings = recipe(name, seed, method)
    seed_everything(seed, verbose=False)
    data = data_of(seed, split)
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
    return {"points": curve.points, "losses": conversation_losses(model, data)}


def fitted(base: Path, data: ChatData, config: Any) -> VLM:
    """The base with a method on it, nothing trained; learned routers are fitted as the recipe does."""
    model = VLM(str(base))
    model.configure_model()
    seed_everything(0, verbose=False)
    mmskip.apply_(model.llm, config)
    if getattr(config, "router", None) in LEARNED:
        batches = recipe(TUNED["router"][0], 0)["model"]["router_fit"]
        fit_routers(model.llm, islice(answer_calls(data.train_dataloader()), batches))
    return model


def untuned(base: Path, data: ChatData, config: mmskip.MoDConfig, base_losses: list[float]) -> dict[str, Any]:
    """The base with the keep ratios of `config` under several routers, nothing trained."""
    batch = next(iter(data.val_dataloader()))

    def result(tried: Any) -> dict[str, float]:
        model = fitted(base, data, tried)
        return evaluate(model, data, batch) | excess(conversation_losses(model, data), base_losses)

    def routed(router: str, seed: int = 0) -> dict[str, float]:
        return result(replace(config, router=router, gate="none", seed=seed))

    draws = [routed("random", seed) for seed in DRAWS]
    blocks = AutoConfig.from_pretrained(base).get_text_config().num_hidden_layers
    keeps = config.keep if isinstance(config.keep, tuple) else (config.keep,)
    return {
        "fitted": routed(config.router),
        "random": {key: sum(draw[key] for draw in draws) / len(draws) for key in draws[0]},
        "uniform": routed("uniform"),
        "norm": routed("norm"),
        "FastV": result(mmskip.TokenReductionConfig(keep=sum(keeps) / len(keeps), after_layer=blocks // 2)),
    }


def answer_calls(loader: Any) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Yield the input of `fit_routers`: arguments of a batch, and the tokens from which its answers are predicted."""
    for batch in loader:
        yield inputs_of(batch), answering_tokens(batch["labels"])


def picture(runs: dict[int, dict[str, Any]]) -> Figure:
    """Loss over that of the base, and compute, against steps: mean over the seeds, single seeds thin."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    titles = (("loss", "test loss / test loss of the base"), ("compute", "counted compute, share of dense"))
    for axes, (key, label) in zip(panels, titles, strict=True):
        axes.axhline(1.0, color=COLORS["base"], linewidth=1, linestyle=":", label=LABELS["base"])
        for name in next(iter(runs.values()))["curves"]:
            curves = [[p[key] / run["base"][key] for p in run["curves"][name]] for run in runs.values()]
            steps = [p["step"] for p in next(iter(runs.values()))["curves"][name]]
            for ys in curves:
                axes.plot(steps, ys, color=COLORS[name], linewidth=0.5, alpha=0.5)
            mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            axes.plot(steps, mean, color=COLORS[name], label=LABELS[name], linewidth=1.8)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e8ecef", linewidth=0.7)
    panels[1].set_ylim(0, 1.05)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def measured(base: Path, seed: int, pairs: int) -> dict[str, Any]:
    """Paired time of a training step of routers and LoRA against LoRA alone, beside the counted ideal."""
    from mmskip.train.savings import counted_savings, measured_speedup

    settings = recipe(TUNED["router+lora"][0], seed)
    data = data_of(seed, "val")
    model = VLM(**(settings["model"] | {"vlm": str(base)}))
    model.configure_model()
    batch = next(iter(data.train_dataloader()))
    ratio = measured_speedup(model, batch, pairs) if pairs else {"speedup": None}
    return {**ratio, "ideal": counted_savings(model, batch)["ideal_speedup"]}


def run_of(seed: int, split: str, names: list[str], every: int) -> dict[str, Any]:
    """Everything of one seed: base, blanked base, untuned controls, curves."""
    folder, data = base_model(seed), data_of(seed, split)
    dense = VLM(str(folder))
    dense.configure_model()
    batch = next(iter(data.val_dataloader()))
    base = evaluate(dense, data, batch)
    data.blank = True
    blank = evaluate(dense, data, batch)
    data.blank = False
    base_losses = conversation_losses(dense, data)
    choice = chosen_keep(seed)
    keep = tuple(choice["keep"])
    curves, ends = {}, {}
    for name in names:
        settings = settings_of(name, keep)
        text = json.dumps([*settings, (CONFIGS / settings[0]).read_text(), every, SIZES])
        key = hashlib.sha256(text.encode()).hexdigest()[:10]
        kept = FOLDER / f"{name}-{folder.name}-{split}-{key}.json"
        tuned = made_once(kept, lambda name=name: tune(name, folder, seed, split, every, keep))
        curves[name], ends[name] = tuned["points"], excess(tuned["losses"], base_losses)
    (config,) = recipe(TUNED["router"][0], seed)["model"]["methods"]
    return {
        "base": base,
        "blanked_base": blank,
        "choice": choice,
        "untuned": untuned(folder, data, replace(config, keep=keep), base_losses),
        "curves": curves,
        "ends": ends,
        "starts_at_base_loss": {name: points[0]["loss"] == base["loss"] for name, points in curves.items()},
    }


def chosen_keep(seed: int) -> dict[str, Any]:
    """The keep ratios of a base: the last of `LADDER` before one whose loss, with fitted routers, may exceed that of
    the base by more than `ALLOWED`. Going on only while each holds keeps the confidence of one test (fixed-sequence
    testing, Learn then Test, arXiv 2110.01052); judged on the validation split and on a separate set."""
    folder = base_model(seed)
    settings = [(CONFIGS / TUNED["router"][0]).read_text(), LADDER, ALLOWED, SIZES]
    kept = FOLDER / f"keep-{folder.name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:10]}.json"
    return dict(made_once(kept, lambda: _choose_keep(seed, folder)))


def _choose_keep(seed: int, folder: Path) -> dict[str, Any]:
    sets = [data_of(seed, "val"), data_of(seed + 1000, "test")]
    dense = VLM(str(folder))
    dense.configure_model()
    base_losses = [loss for data in sets for loss in conversation_losses(dense, data)]
    (start,) = recipe(TUNED["router"][0], seed)["model"]["methods"]
    model = fitted(folder, sets[0], start)
    keep, tried = (1.0,) * len(LADDER[0]), []
    for ratios in LADDER:
        at = losses_at(model, ratios, sets)
        tried.append({"keep": ratios, **excess(at, base_losses)})
        print(json.dumps({"seed": seed, **tried[-1]}), flush=True)
        if tried[-1]["excess"] + 1.645 * tried[-1]["excess_se"] > ALLOWED:
            break
        keep = ratios
    return {"keep": keep, "tried": tried}


def losses_at(model: VLM, keep: tuple[float, ...], sets: list[ChatData]) -> list[float]:
    """Losses by conversation with the routed blocks at these keep ratios."""
    for policy, target in zip(find_policies(model.llm), keep, strict=True):
        policy.target = target
    return [loss for data in sets for loss in conversation_losses(model, data)]


def search() -> dict[str, Any]:
    """Loss over that of the base of the search seed under fitted routers, and the setting of least compute that costs
    at most `ALLOWED` of the loss with 95 % confidence."""
    folder = base_model(SEARCH_SEED)
    sets = [data_of(seed, split) for seed, split in SEARCHED]
    dense = VLM(str(folder))
    dense.configure_model()
    base_losses = [loss for data in sets for loss in conversation_losses(dense, data)]
    batch = next(iter(sets[0].val_dataloader()))
    (start,) = recipe(TUNED["router"][0], SEARCH_SEED)["model"]["methods"]
    tried = []
    for router, hidden in ROUTERS:
        model = fitted(folder, sets[0], replace(start, router=router, router_hidden=hidden))
        for keep in KEEPS:
            losses = losses_at(model, keep, sets)
            counted = compute(model, batch)
            tried.append({"router": router, "hidden": hidden, "keep": keep, "compute": counted})
            tried[-1] |= excess(losses, base_losses)
            print(json.dumps(tried[-1]), flush=True)
    held = [setting for setting in tried if setting["excess"] + 1.645 * setting["excess_se"] <= ALLOWED]
    chosen = min(held, key=lambda setting: setting["compute"], default=None)
    return {
        "name": "router_tuning_search",
        "seed": SEARCH_SEED,
        "sets": SEARCHED,
        "speedup": None,
        "ideal": None if chosen is None else 1 / chosen["compute"],
        "shape": "configs/vlm_dense.yaml, keep ratios of the two blocks of the deeper half",
        "tried": tried,
        "chosen": chosen,
    }


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TUNED, default=list(TUNED))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--search", action="store_true", help="choose router and keep ratios on the search seed")
    parser.add_argument("--every", type=int, default=50, help="steps from one point of the curves to the next")
    parser.add_argument("--pairs", type=int, default=15, help="of a timed step; 0: not timed")
    arguments = parser.parse_args()
    if arguments.search:
        emit(search())
        return
    runs = {seed: run_of(seed, "test", arguments.only, arguments.every) for seed in arguments.seeds}
    save_png(picture(runs), ROOT / "docs" / "router_tuning.png")
    time = measured(base_model(arguments.seeds[0]), arguments.seeds[0], arguments.pairs)
    ends = {name: [run["ends"][name] for run in runs.values()] for name in arguments.only}
    emit(
        {
            "name": "router_tuning",
            "speedup": time["speedup"],
            "ideal": time["ideal"],
            "shape": "configs/vlm_dense.yaml, vlm_router_only.yaml, vlm_mod_lora.yaml; embedded chat set, test split",
            "loss_over_base": ends,
            "mean_excess": {name: sum(end["excess"] for end in each) / len(each) for name, each in ends.items()},
            "seeds": runs,
            "time": time,
        }
    )


if __name__ == "__main__":
    main()
