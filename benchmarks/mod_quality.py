"""Does learned routing keep the quality of the dense model, and are the controls worse? On the embedded set.

    python benchmarks/mod_quality.py                    all variants, two seeds (over an hour on two cores)
    python benchmarks/mod_quality.py --seeds 0 --only dense mod random
    python benchmarks/mod_quality.py --epochs 1         a quick look

Every variant is trained by the recipe of configs/videollm_mod.yaml on the same videos, in the same order, for the same
number of steps, and scored on test videos no variant has seen:

    dense      no routing                             mod       the recipe: learned routing
    random     random tokens at the same keep         uniform   evenly spaced tokens at the same keep
    shallow    a dense model with fewer layers, whose measured step takes at least as long as mod's
    coarse     a dense model with fewer vision tokens per frame (2 x 2 instead of 3 x 3)
    dense_blank, mod_blank                            the same models with their visual input blanked

Finished trainings are kept under runs/mod_quality by the hash of their whole recipe, and not repeated.
"""

import argparse
import copy
import hashlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from _measure import RESULTS, ROOT, emit, interleaved_ratio

import mmskip
from mmskip.files import write_json
from mmskip.viz import quality_against_compute, save_png

CONFIG = ROOT / "configs" / "videollm_mod.yaml"
VARIANTS = ("dense", "mod", "random", "uniform", "shallow", "coarse", "dense_blank", "mod_blank")
METRICS = ("lm_ppl", "lm_correctness", "time_diff", "fluency")


def recipe(variant: str, seed: int, epochs: int | None, layers: int | None) -> dict[str, Any]:
    """The settings of one training: the recipe with what the variant changes."""
    settings: dict[str, Any] = copy.deepcopy(yaml.safe_load(CONFIG.read_text()))
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    routing = model["methods"][0]["init_args"]
    name = variant.removesuffix("_blank")
    if name in ("dense", "shallow", "coarse"):
        model["methods"] = []
    else:
        routing["router"] = "linear" if name == "mod" else name
        model["methods"] = [mmskip.MoDConfig(**routing)]
    if variant == "shallow":
        model["llm"]["num_hidden_layers"] = layers
    if variant == "coarse":
        data["grid"] = 2
    data["blank"] = variant.endswith("_blank")
    data["seed"] = settings["seed_everything"] = seed
    settings["trainer"]["max_epochs"] = epochs or settings["trainer"]["max_epochs"]
    return settings


def build(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Model and data module of a recipe."""
    from lightning import seed_everything

    from mmskip.datasets.narration import NarrationData
    from mmskip.models.video_llm import VideoLLM

    seed_everything(settings["seed_everything"], verbose=False)
    data = NarrationData(root=str(ROOT / "data"), **settings["data"]["init_args"])
    data.prepare_data()
    data.setup()
    return VideoLLM(**settings["model"]["init_args"]), data


def train(settings: dict[str, Any], out: Path) -> None:
    """Train and test one variant, and write its metrics."""
    from lightning import Trainer

    model, data = build(settings)
    trainer = Trainer(
        max_epochs=settings["trainer"]["max_epochs"],
        gradient_clip_val=settings["trainer"].get("gradient_clip_val"),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    result = {"metrics": {k: model.results[k] for k in METRICS}, "steps": trainer.global_step}
    write_json(result, out)


def timed_models(variants: list[str], layers: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Untrained models of the variants, each with its batch of the same videos."""
    found = {}
    for variant in variants:
        model, data = build(recipe(variant, 0, None, layers))
        model.hparams.update(feature_dim=data.feature_dim, fps=data.fps)
        model.trainer = _Stub(data)
        model.configure_model()
        found[variant] = (model.train(), next(iter(data.train_dataloader())))
    return found


class _Stub:
    """Stands in for the trainer, of which building a model reads the data module only."""

    def __init__(self, datamodule: Any) -> None:
        self.datamodule = datamodule


def step_of(model: Any, batch: dict[str, Any]) -> Any:
    """A function that makes one training step, AdamW included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.loss_sums(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def equal_time_layers(pairs: int) -> int:
    """Layers of the shallowest dense model whose step takes at least as long as the routed one's."""
    model, batch = timed_models(["mod"], 1)["mod"]
    routed = step_of(model, batch)
    full = recipe("dense", 0, None, None)["model"]["init_args"]["llm"]["num_hidden_layers"]
    for layers in range(full // 2, full):
        shallow = step_of(*timed_models(["shallow"], layers)["shallow"])
        if interleaved_ratio(shallow, routed, pairs).median >= 1:
            return layers
    return full


def costs(variants: list[str], layers: int, pairs: int) -> dict[str, dict[str, Any]]:
    """Counted FLOPs as a share of dense, and the measured speed-up of a training step over dense."""
    models = timed_models([*dict.fromkeys(["dense", *(v for v in variants if not v.endswith("_blank"))])], layers)
    counted = {}
    for variant, (model, batch) in models.items():
        with mmskip.trace(model.llm) as trace:
            model.loss_sums(batch)
        counted[variant] = mmskip.cost(model.llm, trace).flops
    dense = step_of(*models["dense"])
    found = {}
    for variant, (model, batch) in models.items():
        ratio = interleaved_ratio(dense, step_of(model, batch), pairs)
        found[variant] = {
            "counted": counted[variant] / counted["dense"],
            "speedup": ratio.median,
            "interquartile": [ratio.q1, ratio.q3],
        }
    return found


def run_all(todo: list[tuple[str, int]], arguments: argparse.Namespace, layers: int, jobs: int) -> None:
    """Train what is not finished, `jobs` at a time, each in a process of its own."""
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    while todo or running:
        while todo and len(running) < jobs:
            variant, seed = todo.pop(0)
            command = [sys.executable, __file__, "--worker", variant, "--seeds", str(seed), "--layers", str(layers)]
            command += ["--epochs", str(arguments.epochs)] if arguments.epochs else []
            threads = max(1, (os.cpu_count() or 1) // jobs)
            process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            running.append((f"{variant}, seed {seed}", process))
            print(f"training {running[-1][0]}", flush=True)
        label, process = running.pop(0)
        if process.wait() != 0:
            raise RuntimeError(f"the training of {label} failed with exit status {process.returncode}")
        print(f"finished {label}", flush=True)


def result_file(variant: str, seed: int, epochs: int | None, layers: int) -> Path:
    """Where the metrics of a training are kept; the name holds a hash of all its settings."""
    from mmskip.datasets.generated import GeneratedConfig

    settings = recipe(variant, seed, epochs, layers)
    model = {**settings["model"]["init_args"]}
    model["methods"] = [method.to_dict() for method in model["methods"]]
    limits = {key: settings["trainer"].get(key) for key in ("max_epochs", "gradient_clip_val")}
    whole = [model, settings["data"]["init_args"], limits, GeneratedConfig().id, seed]
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:10]
    return ROOT / "runs" / "mod_quality" / f"{variant}-{seed}-{digest}.json"


def seeds_of(variant: str, seeds: list[int]) -> list[int]:
    """The seeds a variant is trained with: one is enough to see what blanking costs."""
    return seeds[:1] if variant.endswith("_blank") else seeds


def summary(arguments: argparse.Namespace, layers: int) -> dict[str, dict[str, Any]]:
    """Per variant: the metrics of each seed and their means."""
    found = {}
    for variant in arguments.only:
        files = [result_file(variant, seed, arguments.epochs, layers) for seed in seeds_of(variant, arguments.seeds)]
        runs = [json.loads(file.read_text()) for file in files]
        means = {m: statistics.mean(run["metrics"][m] for run in runs) for m in METRICS}
        found[variant] = {"mean": means, "seeds": [run["metrics"] for run in runs]}
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as text."""
    lines = [
        f"{'':12s} {'LM-PPL':>8s} {'per seed':>20s} {'LM-corr.':>9s} {'TimeDiff':>9s} {'Fluency':>8s} {'speed-up':>9s}"
    ]
    for variant, result in results.items():
        mean, seeds = result["mean"], " ".join(f"{seed['lm_ppl']:.3f}" for seed in result["seeds"])
        speed = f"{result['cost']['speedup']:.2f}x" if "cost" in result else ""
        lines.append(
            f"{variant:12s} {mean['lm_ppl']:8.3f} {seeds:>20s} {mean['lm_correctness']:9.3f} {mean['time_diff']:9.3f} "
            f"{mean['fluency']:8.3f} {speed:>9s}"
        )
    return "\n".join(lines)


def verdicts(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """LM-PPL of each variant over that of mod (above 1: mod is better), and what blanking costs."""
    ppl = {variant: result["mean"]["lm_ppl"] for variant, result in results.items()}
    found = {f"{v}_over_mod": ppl[v] / ppl["mod"] for v in ppl if v != "mod" and "mod" in ppl}
    for name in ("dense", "mod"):
        if {name, f"{name}_blank"} <= set(ppl):
            found[f"{name}_blanked_over_seeing"] = ppl[f"{name}_blank"] / ppl[name]
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="trainings at a time")
    parser.add_argument("--layers", type=int, help="of the shallow model (default: found by measuring)")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.worker:
        training = (arguments.worker, arguments.seeds[0], arguments.epochs, arguments.layers)
        return train(recipe(*training), result_file(*training))
    for grid_variant in ("dense", "coarse"):  # features are encoded once, before trainings share them
        build(recipe(grid_variant, 0, None, None))
    layers = arguments.layers or equal_time_layers(arguments.pairs)
    print(f"the shallow control has {layers} layers")
    wanted = [(v, seed) for seed in arguments.seeds for v in arguments.only if seed in seeds_of(v, arguments.seeds)]
    todo = [(v, s) for v, s in wanted if not result_file(v, s, arguments.epochs, layers).exists()]
    run_all(todo, arguments, layers, arguments.jobs)
    results = summary(arguments, layers)
    for variant, cost in costs(arguments.only, layers, arguments.pairs).items():
        if variant in results:
            results[variant]["cost"] = cost
    print(table(results))
    points = [
        {
            "label": variant,
            "value": result["mean"]["lm_ppl"],
            "counted": result["cost"]["counted"],
            "measured": 1 / result["cost"]["speedup"],
            "highlight": variant == "mod",
        }
        for variant, result in results.items()
        if "cost" in result
    ]
    save_png(quality_against_compute(points), RESULTS / "mod_quality.png")
    own = results.get("mod", {}).get("cost", {"speedup": 1.0, "counted": 1.0})
    emit(
        {
            "name": "mod_quality",
            "speedup": own["speedup"],
            "ideal": 1 / own["counted"],
            "shape": f"configs/videollm_mod.yaml, seeds {arguments.seeds}, shallow {layers} layers",
            "verdicts": verdicts(results),
            "results": results,
        }
    )


if __name__ == "__main__":
    main()
