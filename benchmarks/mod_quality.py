"""Does learned routing keep the quality of the dense model, and are the controls worse? On the embedded set.

    python benchmarks/mod_quality.py                    all variants, three seeds (about 45 minutes on two quiet cores)
    python benchmarks/mod_quality.py --seeds 0 --only dense mod random
    python benchmarks/mod_quality.py --epochs 1         a quick look
    python benchmarks/mod_quality.py --split val --data_seed 100 --seeds 100 101      where settings are chosen

Every variant is trained by the recipe of configs/videollm_mod.yaml on the same videos, in the same order, for the same
number of steps, and scored on test videos no variant has seen. Whatever is searched (noise, gate, rates, the task) is
chosen on the validation videos of other seeds, by the last line above; the test videos are for reporting.

    dense      no routing                             mod       the recipe: learned routing
    random     random tokens at the same keep         uniform   evenly spaced tokens at the same keep
    shallow    a dense model with fewer layers, whose measured step takes at least as long as mod's
    coarse     a dense model with fewer vision tokens per frame (2 x 2 instead of 3 x 3)
    dense_blank, mod_blank                            the same models with their visual input blanked

Finished trainings are kept under runs/mod_quality by the hash of their full recipe, and not repeated: an interrupted
benchmark resumes where it stopped.
"""

import argparse
import copy
import hashlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer, seed_everything

import mmskip
from common.measure import RESULTS, ROOT, emit, interleaved_ratio
from common.words import word_losses
from mmskip.datasets.narration.module import NarrationData
from mmskip.datasets.synthetic.videos import GeneratedConfig
from mmskip.datasets.synthetic.world import SceneConfig
from mmskip.models.video_llm.module import VideoLLM
from mmskip.utils.command import CommandParser
from mmskip.utils.files import write_json
from mmskip.viz.curves import quality_against_compute
from mmskip.viz.figure import save_png

CONFIG = ROOT / "configs" / "videollm_mod.yaml"
VARIANTS = ("dense", "mod", "random", "uniform", "shallow", "coarse", "dense_blank", "mod_blank")
METRICS = ("lm_ppl", "lm_correctness", "time_diff", "fluency")


@dataclass(frozen=True)
class Run:
    """One training: variant, seed and scored split. `layers` is the depth of the shallow control."""

    variant: str
    seed: int
    layers: int
    epochs: int | None = None
    split: str = "test"
    data_seed: int | None = None

    def recipe(self) -> dict[str, Any]:
        """The settings of the training: the recipe with the changes of the variant."""
        settings: dict[str, Any] = copy.deepcopy(yaml.safe_load(CONFIG.read_text()))
        model, data = settings["model"]["init_args"], settings["data"]["init_args"]
        routing = model["methods"][0]["init_args"]
        name = self.variant.removesuffix("_blank")
        if name in ("dense", "shallow", "coarse"):
            model["methods"] = []
        else:
            routing["router"] = "linear" if name == "mod" else name
            model["methods"] = [mmskip.MoDConfig(**routing)]
        if name == "shallow":
            model["llm"]["num_hidden_layers"] = self.layers
        if name == "coarse":
            data["grid"] = 2
        data["blank"] = self.variant.endswith("_blank")
        data["seed"] = settings["seed_everything"] = self.seed
        generated = dict(data.get("generated") or {})
        if self.data_seed is not None:
            generated["seed"] = self.data_seed
        data["generated"] = GeneratedConfig(**{**generated, "scene": SceneConfig(**generated.get("scene", {}))})
        settings["trainer"]["max_epochs"] = self.epochs or settings["trainer"]["max_epochs"]
        return settings

    @property
    def file(self) -> Path:
        """File of the results of the training; its name holds a hash of all settings."""
        settings = self.recipe()
        model, data = settings["model"]["init_args"], settings["data"]["init_args"]
        model["methods"] = [method.to_dict() for method in model["methods"]]
        data["generated"] = data["generated"].id
        limits = {key: settings["trainer"].get(key) for key in ("max_epochs", "gradient_clip_val")}
        recipe = [model, data, limits, self.seed, self.split]
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
        return ROOT / "runs" / "mod_quality" / f"{self.variant}-{self.seed}-{digest}.json"


def build(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Model and data module of a recipe."""
    seed_everything(settings["seed_everything"], verbose=False)
    data = NarrationData(root=str(ROOT / "data"), **settings["data"]["init_args"])
    data.prepare_data()
    data.setup()
    return VideoLLM(**settings["model"]["init_args"]), data


def train(run: Run) -> None:
    """Train and score one variant, and write its metrics and its loss by kind of word."""
    settings = run.recipe()
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
    loader = data.test_dataloader() if run.split == "test" else data.val_dataloader()
    trainer.test(model, dataloaders=loader, verbose=False)
    metrics = {name: model.results[name] for name in METRICS}
    write_json({"metrics": metrics, "words": word_losses(model, loader), "steps": trainer.global_step}, run.file)


def timed_models(variants: list[str], like: Run) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Untrained models of the variants, `like` that run otherwise, each with its batch of the same videos."""
    found = {}
    for variant in variants:
        model, data = build(replace(like, variant=variant).recipe())
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


def equal_time_layers(like: Run, pairs: int) -> int:
    """Layers of the shallowest dense model whose step takes at least as long as the routed one's."""
    model, batch = timed_models(["mod"], like)["mod"]
    routed = step_of(model, batch)
    full = like.recipe()["model"]["init_args"]["llm"]["num_hidden_layers"]
    for layers in range(full // 2, full):
        shallow = step_of(*timed_models(["shallow"], replace(like, layers=layers))["shallow"])
        if interleaved_ratio(shallow, routed, pairs).median >= 1:
            return layers
    return full


def costs(variants: list[str], like: Run, pairs: int) -> dict[str, dict[str, Any]]:
    """Counted FLOPs as a share of dense, and the measured speed-up of a training step over dense."""
    models = timed_models([*dict.fromkeys(["dense", *(v for v in variants if not v.endswith("_blank"))])], like)
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


def run_all(todo: list[Run], jobs: int) -> None:
    """Train, `jobs` at a time, each in a separate process."""
    running: list[tuple[Run, subprocess.Popen[bytes]]] = []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    while todo or running:
        while todo and len(running) < jobs:
            run = todo.pop(0)
            command = [sys.executable, __file__, "--worker", json.dumps(asdict(run))]
            running.append((run, subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})))
            print(f"training {run.variant}, seed {run.seed}", flush=True)
        run, process = running.pop(0)
        if process.wait() != 0:
            raise RuntimeError(
                f"the training of {run.variant}, seed {run.seed}, failed with exit status {process.returncode}"
            )
        print(f"finished {run.variant}, seed {run.seed}", flush=True)


def seeds_of(variant: str, seeds: list[int]) -> list[int]:
    """The seeds a variant is trained with: one is enough to see what blanking costs."""
    return seeds[:1] if variant.endswith("_blank") else seeds


def summary(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Per variant: the metrics of each seed, their means and the spread of LM-PPL, and the loss by kind of word."""
    found = {}
    for variant, several in runs.items():
        read = [json.loads(run.file.read_text()) for run in several]
        ppl = [one["metrics"]["lm_ppl"] for one in read]
        found[variant] = {
            "mean": {m: statistics.mean(one["metrics"][m] for one in read) for m in METRICS},
            "lm_ppl_spread": statistics.stdev(ppl) if len(ppl) > 1 else None,
            "seeds": [one["metrics"] for one in read],
            "words": {kind: statistics.mean(one["words"][kind] for one in read) for kind in read[0]["words"]},
            "steps": read[0]["steps"],
        }
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as text: the metrics, and then the loss by kind of word."""
    lines = [
        f"{'':12s} {'LM-PPL':>8s} {'per seed':>24s} {'LM-corr.':>9s} {'TimeDiff':>9s} {'Fluency':>8s} {'speed-up':>9s}"
    ]
    for variant, result in results.items():
        mean, seeds = result["mean"], " ".join(f"{seed['lm_ppl']:.3f}" for seed in result["seeds"])
        speed = f"{result['cost']['speedup']:.2f}x" if "cost" in result else ""
        lines.append(
            f"{variant:12s} {mean['lm_ppl']:8.3f} {seeds:>24s} {mean['lm_correctness']:9.3f} {mean['time_diff']:9.3f} "
            f"{mean['fluency']:8.3f} {speed:>9s}"
        )
    kinds = list(next(iter(results.values()))["words"])
    lines += ["", f"{'nats per word':12s} " + " ".join(f"{kind:>12s}" for kind in kinds)]
    for variant, result in results.items():
        lines.append(f"{variant:13s} " + " ".join(f"{result['words'][kind]:12.3f}" for kind in kinds))
    return "\n".join(lines)


def verdicts(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """LM-PPL of each variant over that of mod (above 1: mod is better), in the mean and seed by seed, what blanking
    costs, and whether each claim holds in the mean and in every seed."""
    ppl = {v: [seed["lm_ppl"] for seed in result["seeds"]] for v, result in results.items()}
    found: dict[str, Any] = {"over_mod": {}, "blanked_over_seeing": {}, "claims": {}}
    limits = {"dense": ("within_2_percent_of_dense", 1 / 1.02)}
    limits |= {v: (f"better_than_{v}", 1.0) for v in ("random", "uniform", "shallow", "coarse")}
    for variant, (claim, limit) in limits.items():
        if {variant, "mod"} <= set(ppl):
            seeds = [other / own for other, own in zip(ppl[variant], ppl["mod"], strict=True)]
            mean = statistics.mean(ppl[variant]) / statistics.mean(ppl["mod"])
            found["over_mod"][variant] = {"mean": mean, "seeds": seeds}
            found["claims"][claim] = {"in_the_mean": mean > limit, "in_every_seed": min(seeds) > limit}
    for name in ("dense", "mod"):
        if {name, f"{name}_blank"} <= set(ppl):
            cost = ppl[f"{name}_blank"][0] / ppl[name][0]
            found["blanked_over_seeing"][name] = cost
            found["claims"][f"blanking_{name}_costs_20_percent"] = cost >= 1.2
    return found


def points(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The variants as points of quality against compute."""
    return [
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


def parse() -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="videos to score on")
    parser.add_argument("--data_seed", type=int, help="of the generated videos (default: the recipe's)")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of training steps")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="trainings at a time")
    parser.add_argument("--layers", type=int, help="of the shallow model (default: found by measuring)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.worker:
        return train(Run(**json.loads(arguments.worker)))
    where = (arguments.epochs, arguments.split, arguments.data_seed)
    like = Run("dense", arguments.seeds[0], arguments.layers or 1, *where)
    for variant in ("dense", "coarse"):  # features are encoded once, before trainings share them
        if variant == "dense" or variant in arguments.only:
            build(replace(like, variant=variant).recipe())
    layers = arguments.layers or equal_time_layers(like, arguments.pairs)
    print(f"the shallow control has {layers} layers")
    runs = {
        variant: [Run(variant, seed, layers, *where) for seed in seeds_of(variant, arguments.seeds)]
        for variant in arguments.only
    }
    ordered = sorted((run for several in runs.values() for run in several), key=lambda run: run.seed)
    run_all([run for run in ordered if not run.file.exists()], arguments.jobs)
    results = summary(runs)
    for variant, cost in costs(arguments.only, replace(like, layers=layers), arguments.pairs).items():
        if variant in results:
            results[variant]["cost"] = cost
    print(table(results))
    own = results.get("mod", {}).get("cost", {"speedup": 1.0, "counted": 1.0})
    report = {
        "name": "mod_quality",
        "speedup": own["speedup"],
        "ideal": 1 / own["counted"],
        "shape": f"configs/videollm_mod.yaml, {arguments.split}, seeds {arguments.seeds}, shallow {layers} layers",
        "shallow_layers": "given" if arguments.layers else "measured",
        "verdicts": verdicts(results),
        "results": results,
    }
    if arguments.split == "test":
        save_png(quality_against_compute(points(results)), RESULTS / "mod_quality.png")
        emit(report)
    else:  # a search does not change the reported results
        emit(report, ROOT / "runs" / "mod_quality" / "search.json")


if __name__ == "__main__":
    main()
