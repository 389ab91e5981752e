"""MuE on the embedded captions and entailment pairs: quality and measured time of layers left early, and controls.

One captioner is trained by configs/mue.yaml; a shallower one alike, with fewer layers. On validation pictures of
another seed the thresholds are chosen: for MuE the least measured time that keeps a share of full depth's quality, for
the other ways of exiting the best quality in no more measured time than MuE takes, and for the comparison with the
shallow model MuE's best quality in no more measured time than that one takes. Test pictures of further seeds give the
figures: accuracy and CIDEr, layers left out, FLOPs counted sample by sample, and time of single samples and of batches,
paired and interleaved with full depth in one process.

    python benchmarks/mue.py --train full       # and --train shallow; kept under runs/mue_bench
    python benchmarks/mue.py --choose           # thresholds on the validation pictures of the search seed
    python benchmarks/mue.py --score            # quality on test pictures (without: only where no scores are kept)
    python benchmarks/mue.py --separate         # how well scores separate settled answers, before and after `settle`
    python benchmarks/mue.py                    # times; draws docs/mue_*.png

Ways of exiting: `mue` (saturation in encoder and decoder), `entropy` and `patience` (in the decoder, with the full
encoder or with MuE's exits), `fixed` (the same decoder layer for every token), `random` (the library's learned exits,
whose heads draw lots such that as many states exit after each layer as under MuE). The last line is one JSON object.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from common.measure import ROOT, emit
from common.mue import (
    CLOCKS,
    Call,
    Pictures,
    Setting,
    at_random,
    call_of,
    cost,
    cost_of_other,
    layers_run,
    quality,
    records,
    where_time_goes,
)
from common.mue_observed import observed
from mmskip import EarlyExitConfig, viz
from mmskip.datasets.captioning.module import CaptionData
from mmskip.exits.settings import ExitAt, FixedExit
from mmskip.models.captioner.module import Captioner
from mmskip.train.cli.train import main as train_cli
from mmskip.train.evaluation.captioner.exit_sweep import depths
from mmskip.train.load_run import find_run, load_captioner, load_data
from mmskip.utils.command import CommandParser
from mmskip.utils.files import write_json
from mmskip.utils.results import ResumableResults

FOLDER = ROOT / "runs" / "mue_bench"
TASKS = {"entailment": ("accuracy", 0.99), "caption": ("cider", 0.96)}
"""The metric of a task, and the share of full depth's that a setting must keep."""
MARGIN = 0.5
"""Share of what may be lost that a setting may lose on the validation pictures: others will be harder."""
SHALLOW = {"encoder_layers": 2, "decoder_layers": 5}
SETTLE = ("--model.settle_weight=0.3", "--model.lr=2e-3", "--trainer.max_epochs=3")
SEARCH_SEED, SEEDS = 100, (1, 2)
ENCODERS = 2
"""Settings of the encoder that are tried with every threshold of the decoder."""
Models = dict[str, Captioner]
Tried = dict[str, Any]
"""A setting with its quality, the layers that ran per sample and, where it was measured, its cost."""


def train(name: str, options: Sequence[str]) -> None:
    """Train by the recipe (a run `<name>_base`), then on from its weights with answers that learn to stay. A first part
    that is finished is not repeated; the options are for the rest."""
    base = f"{name}_base"
    if finished(base) is None:
        _fit(name, base, options)
        options = [option for option in options if not option.startswith("--ckpt_path")]
    _fit(name, name, [*SETTLE, f"--start_from={finished(base)}", *options])


def finished(run: str) -> Path | None:
    """The folder of the newest finished run of a name."""
    return max((file.parent for file in (FOLDER / "runs" / run).glob("*/results.json")), default=None)


def _fit(name: str, run: str, options: Sequence[str]) -> None:
    """One run; the shallow model differs in its layers only."""
    layers = [f"--model.text.{key}={value}" for key, value in SHALLOW.items()] if name == "shallow" else []
    root = [f"--data.root={FOLDER / 'data'}", f"--runs_dir={FOLDER / 'runs'}", f"--name={run}"]
    train_cli(["fit", "--config", "mue.yaml", *root, *layers, *options])


# --- choosing thresholds --------------------------------------------------------------------------------------------


class Search:
    """The settings of one task on the validation pictures.

    Args:
        models: full and, if there is one, shallow.
        task: which.
        pictures: of the search seed.
        tokenizer: of the model.
        options: the arguments.
    """

    def __init__(
        self, models: Models, task: str, pictures: Pictures, tokenizer: Any, options: argparse.Namespace
    ) -> None:
        self.models, self.model, self.task = models, models["full"], task
        self.captions, self.tokenizer, self.options = pictures.captions, tokenizer, options
        self.batches = pictures.batches(task, 50)
        few = options.timed if task == "entailment" else max(2, options.timed // 4)
        self.calls = [call_of(task, batch) for batch in pictures.single(task, few)]
        self.seen = observed(self.model, self.batches[:2], task)
        self.full = self.tried(Setting("full"))
        share = TASKS[task][1]
        self.goal = (1 - MARGIN * (1 - share)) * self.full["quality"]
        depth = len(self.model.view.decoder)
        self.fixed = [self.tried(Setting("fixed", EarlyExitConfig(FixedExit(number)))) for number in range(1, depth)]
        # no token needs to go beyond the first layer that is good enough for all of them, with or without the margin
        levels = (self.goal, share * self.full["quality"])
        enough = {next((n for n, t in enumerate(self.fixed, 1) if t["quality"] >= level), None) for level in levels}
        # the head knows an answer after the layer that finds it; saturation and patience, which compare, a layer later
        self.places = [
            [(points, most) for most in enough for points in self.seen.points(most or depth, lag)] for lag in (0, 1)
        ]
        print(f"{task}: settled {Counter(self.seen.settled)}; points and most layers {self.places}", flush=True)

    def tried(self, setting: Setting) -> Tried:
        """A setting with its quality and its layers."""
        rows = records(self.model, self.task, self.batches, setting, self.tokenizer)
        found = {"quality": quality(self.task, rows, self.captions), "layers": layers_run(rows)}
        return {**setting.to_dict(), **found}

    def timed(self, tried: Tried) -> Tried:
        """Add the measured time, as a share of full depth's."""
        if "measured" in tried:
            return tried
        pairs, clock = self.options.pairs, self.options.clock
        return {**tried, **cost(self.model, Setting.from_dict(tried), self.calls, pairs, clock)}

    def mue(self) -> list[Tried]:
        """MuE's settings that no other beats in both quality and layers, timed."""
        encoders = product(*(self.seen.thresholds(part) for part in ("image", "text")))
        encoder_front = front([self.tried(_setting("mue", {"image": image, "text": text})) for image, text in encoders])
        kept = [t for t in encoder_front if t["quality"] >= self.goal] or encoder_front[-1:]
        found = list(encoder_front)
        for tried, (points, most) in product(kept[:ENCODERS], self.places[1]):
            for threshold in self.seen.thresholds("saturation", points, most):
                found.append(self.tried(_setting("mue", _encoder(tried), threshold, points, most)))
        return [self.timed(t) for t in front(found)]

    def heads(self, way: str, mue: Tried) -> list[Tried]:
        """Settings of exits by the decoder's head, with the full encoder or with MuE's exits, timed."""
        settings = []
        for encoder, (points, most) in product(({}, _encoder(mue)), self.places[way == "patience"]):
            if way == "entropy":
                thresholds = self.seen.thresholds("entropy", points, most)
            else:
                count = len(points) if points else (most or len(self.model.view.decoder)) - 1
                thresholds = [float(n) for n in range(1, min(count, 7))]
            settings += [_setting(way, encoder, t, points, most, criterion=way) for t in thresholds]
        settings = settings or [_setting(way, {}, 1.0, criterion=way)]
        return [self.timed(t) for t in front([self.tried(setting) for setting in settings])]

    def choose(self) -> dict[str, Any]:
        """By way the setting that the report will show."""
        found = self.mue()
        good = [t for t in found if t["quality"] >= self.goal]
        best = min(good, key=lambda t: t["measured"]) if good else max(found, key=lambda t: t["quality"])
        kept: dict[str, Any] = {"full": self.full, "mue": best}
        for way in ("entropy", "patience"):
            others = self.heads(way, best)
            kept[way], found = _best_within(others, best["measured"]), found + others
        fixed = [self.timed(t) for t in front(self.fixed)]
        kept["fixed"], found = _best_within(fixed, best["measured"]), found + fixed
        rows = records(self.model, self.task, self.batches, Setting.from_dict(best), self.tokenizer)
        own = Setting.from_dict(best).config
        kept["random"] = self.timed(self.tried(at_random(rows, self.model, own)))
        if "shallow" in self.models:
            pairs, clock = self.options.pairs, self.options.clock
            time = cost_of_other(self.model, self.models["shallow"], self.calls, pairs, clock)
            own = [t for t in found if t["way"] == "mue"]
            kept["mue_as_shallow"] = {**_best_within(own, time["measured"]), "shallow": time}
        return {**kept, "tried": found}


def _setting(
    way: str,
    encoder: dict[str, Any],
    decoder: float = 1.0,
    points: tuple[int, ...] | None = None,
    most: int | None = None,
    **fields: Any,
) -> Setting:
    exits = ExitAt(decoder, exit_layers=points, max_layers=most, **fields)
    return Setting(way, EarlyExitConfig(exits, **encoder))


def _encoder(tried: Tried) -> dict[str, Any]:
    """Exits of a setting in the encoder."""
    config = Setting.from_dict(tried).config
    return {part: getattr(config, part) for part in ("image", "text")}


def front(tried: Sequence[Tried]) -> list[Tried]:
    """Keep the settings that no other beats in both quality and layers, fewest layers first; of equals the one of
    fewest exit layers."""

    def points(one: Tried) -> int:
        config = Setting.from_dict(one).config
        exits = None if config is None else config.decoder
        return len((exits.exit_layers if isinstance(exits, ExitAt) else None) or range(100))

    kept: list[Tried] = []
    for one in sorted(tried, key=lambda t: (t["layers"], -t["quality"], points(t))):
        if not kept or one["quality"] > kept[-1]["quality"]:
            kept.append(one)
    return kept


def _best_within(tried: Sequence[Tried], time: Any) -> Tried:
    """The best quality in no more time; the cheapest where nothing is within it."""
    within = [t for t in tried if t["measured"] <= time]
    return max(within, key=lambda t: t["quality"]) if within else min(tried, key=lambda t: t["measured"])


# --- figures on test pictures ---------------------------------------------------------------------------------------


def settings_of(chosen: dict[str, Any]) -> dict[str, Setting]:
    """The chosen settings by way, full depth first."""
    return {way: Setting.from_dict(one) for way, one in chosen.items() if way != "tried"}


def scored(models: Models, chosen: dict[str, Any], sets: Sequence[Pictures], tokenizer: Any) -> dict[str, Any]:
    """Quality of every setting on each set of test pictures, and where it left."""
    model, found = models["full"], dict[str, Any]()
    for task in TASKS:
        found[task] = {way: {"by_seed": [], "rows": []} for way in settings_of(chosen[task])}
        found[task] |= {way: {"by_seed": [], "rows": []} for way in ("blanked", *(set(models) & {"shallow"}))}
        for pictures in sets:
            batches, captions = pictures.batches(task, 50), pictures.captions
            for way, setting in settings_of(chosen[task]).items():
                rows = records(model, task, batches, setting, tokenizer)
                found[task][way]["by_seed"].append(quality(task, rows, captions))
                if task == "caption":
                    rows = [{**row, "right": row["caption"] in captions[row["uid"]]} for row in rows]
                found[task][way]["rows"] += rows
            others = {"blanked": (model, pictures.batches(task, 50, blank=True))}
            others |= {name: (one, batches) for name, one in models.items() if name == "shallow"}
            for name, (one, given) in others.items():
                rows = records(one, task, given, Setting("full"), tokenizer)
                found[task][name]["by_seed"].append(quality(task, rows, captions))
        for one in found[task].values():
            one["quality"] = sum(one["by_seed"]) / len(one["by_seed"])
            rows = one.pop("rows")
            if rows:
                one["exits"] = depths(rows, model)
        print(task, {way: round(one["quality"], 4) for way, one in found[task].items()}, flush=True)
    return found


def separation(pictures: Pictures) -> dict[str, Any]:
    """By task, criterion and part of training, see `Observed.separation`."""
    found: dict[str, Any] = {task: {"saturation": {}, "entropy": {}} for task in TASKS}
    for run in ("full_base", "full"):
        model = load_captioner(find_run(finished(run) or FOLDER / "runs" / run))
        for task in TASKS:
            seen = observed(model, pictures.batches(task, 50), task)
            for criterion, by_run in found[task].items():
                by_run[run] = seen.separation(criterion)
                cells = " ".join("   -" if one is None else f"{one:.2f}" for one in by_run[run])
                print(f"{task:<11} {run:<10} {criterion:<11} {cells}", flush=True)
    return found


def timed(models: Models, chosen: dict[str, Any], pictures: Pictures, options: argparse.Namespace) -> dict[str, Any]:
    """Cost of every setting against full depth, of single samples and of batches, and where full depth's time goes."""
    model, found = models["full"], dict[str, Any]()
    for task in TASKS:
        few = options.timed if task == "entailment" else max(2, options.timed // 4)
        found[task] = {"where": where_time_goes(model, task, pictures.single(task, 2), options.pairs, options.clock)}
        for size, batches in ((1, pictures.single(task, few)), (32, pictures.together(task, 32))):
            calls: list[Call] = [call_of(task, batch) for batch in batches]
            for way, setting in settings_of(chosen[task]).items():
                if setting.config is not None:
                    own = cost(model, setting, calls, options.pairs, options.clock)
                    found[task].setdefault(way, {})[str(size)] = own
            if "shallow" in models:
                own = cost_of_other(model, models["shallow"], calls, options.pairs, options.clock)
                found[task].setdefault("shallow", {})[str(size)] = own
            shares = {way: round(v[str(size)]["measured"], 3) for way, v in found[task].items() if way != "where"}
            print(task, size, shares, flush=True)
    return found


def draw(scores: dict[str, Any], times: dict[str, Any], folder: Any) -> None:
    """Draw per task where MuE exits, and quality against counted FLOPs and measured time of single samples."""
    for task, (metric, _) in TASKS.items():
        note = f"{task}: where MuE exits, test pictures of {len(SEEDS)} seeds"
        figure = viz.exit_depths(scores[task]["mue"]["exits"]["histogram"], note)
        viz.save_png(figure, folder / f"mue_{task}_exits.png")
        points = [
            {"label": way, "value": one["quality"], "highlight": way == "mue"}
            | times[task].get(way, {}).get("1", {"counted": 1.0, "measured": 1.0})
            for way, one in scores[task].items()
            if way not in ("blanked", "mue_as_shallow")  # MuE is drawn once
        ]
        note = f"{task}, single samples; with a blanked image {scores[task]['blanked']['quality']:.3g}"
        figure = viz.quality_against_compute(points, metric, lower_is_better=False, note=note)
        viz.save_png(figure, folder / f"mue_{task}.png")


def report(
    model: Captioner,
    chosen: dict[str, Any],
    scores: dict[str, Any],
    times: dict[str, Any],
    separated: dict[str, Any],
    clock: str,
) -> None:
    """Print the table and the JSON line."""
    for task, (metric, share) in TASKS.items():
        where = {name: round(value, 2) for name, value in times[task]["where"].items()}
        print(f"\n{task} ({metric}; {share:.0%} of full depth is kept on the validation pictures); ms {where}")
        for way, one in scores[task].items():
            cells = [
                f"{size}: {c['measured']:.3f} [{c['low']:.3f}, {c['high']:.3f}]"
                for size, c in times[task].get(way, {}).items()
            ]
            left = f"{one['exits']['layers_left_out']:.3f}" if "exits" in one else "-"
            print(f"  {way:<14} {one['quality']:>8.4f}  left out {left:>5}  time at batch " + "; ".join(cells))
    mue = times["entailment"]["mue"]["1"]
    view = model.view
    emit(
        {
            "name": "mue",
            "speedup": round(1 / mue["measured"], 4),
            "ideal": round(1 / mue["counted"], 4),
            "clock": clock,
            "shape": f"{len(view.encoder)}+{len(view.decoder)} layers, width {model.llm.config.d_model}",
            "shallow": SHALLOW,
            "separation": separated,
            "tasks": {
                task: {
                    "chosen": {way: one for way, one in chosen[task].items() if way != "tried"},
                    "scores": scores[task],
                    "times": times[task],
                }
                for task in TASKS
            },
        },
    )


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those of the training command."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", choices=("full", "shallow"), help="train one of the models, and end")
    parser.add_argument("--choose", action="store_true", help="choose thresholds, and end")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="whose thresholds are chosen")
    parser.add_argument("--separate", action="store_true", help="how well scores separate settled answers, and end")
    parser.add_argument("--score", action="store_true", help="quality on test pictures, and end (no timing)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(SEEDS), help="of test pictures; others are printed and not kept"
    )
    parser.add_argument("--count", type=int, default=200, help="pictures per set (default 200)")
    parser.add_argument("--timed", type=int, default=20, help="single samples that are timed (default 20)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of one thread, on a machine with other work"
    )
    parser.add_argument("--pairs", type=int, default=15, help="paired runs (default 15)")
    return parser.parse_known_args()


def main() -> None:
    """Train, choose or report."""
    options, rest = arguments()
    if options.train:
        train(options.train, rest)
        return
    trained = {name: finished(name) for name in ("full", "shallow")}
    if trained["full"] is None:
        raise SystemExit(f"no finished run in {FOLDER / 'runs' / 'full'}: first python benchmarks/mue.py --train full")
    runs = {name: find_run(folder) for name, folder in trained.items() if folder is not None}
    models = {name: load_captioner(run) for name, run in runs.items()}
    data: CaptionData = load_data(runs["full"])
    data.prepare_data()
    file, scores_file, separation_file = (FOLDER / f"{name}.json" for name in ("chosen", "scores", "separation"))
    if options.clock == "cpu":
        torch.set_num_threads(1)
    if options.choose:
        pictures = Pictures(data, FOLDER / "data", "val", SEARCH_SEED, options.count)
        for task in options.tasks:
            found = Search(models, task, pictures, data.tokenizer, options).choose()
            print(task, {w: (o["quality"], o.get("measured")) for w, o in found.items() if w != "tried"})
            ResumableResults(file).put({task: found})  # the other task may run beside this one
        return
    if options.separate:
        pictures = Pictures(data, FOLDER / "data", "val", SEARCH_SEED, options.count)
        write_json(separation(pictures), separation_file)
        return
    chosen = ResumableResults(file).values
    if missing := set(TASKS) - set(chosen):
        raise SystemExit(f"no thresholds for {', '.join(sorted(missing))}: first python benchmarks/mue.py --choose")
    sets = [Pictures(data, FOLDER / "data", "test", seed, options.count) for seed in options.seeds]
    if options.seeds != list(SEEDS):
        scored(models, chosen, sets, data.tokenizer)
        return
    if options.score or not scores_file.is_file():
        write_json(scored(models, chosen, sets, data.tokenizer), scores_file)
    if options.score:
        return
    scores = json.loads(scores_file.read_text())
    times = timed(models, chosen, sets[0], options)
    draw(scores, times, ROOT / "docs")
    separated = ResumableResults(separation_file).values
    report(models["full"], chosen, scores, times, separated, options.clock)


if __name__ == "__main__":
    main()
