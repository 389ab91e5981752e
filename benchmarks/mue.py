"""MuE on the embedded captions and entailment pairs: quality and measured time of layers left early, and controls.

One captioner is trained by configs/mue.yaml; a shallower one alike, with fewer layers. On validation pictures of
another seed the thresholds are chosen: for MuE the fewest layers whose quality keeps a share of full depth's, for the
other ways of exiting the best quality that costs no more layers. Test pictures of further seeds give the figures:
accuracy and CIDEr, layers left out, FLOPs counted sample by sample, and time of single samples and of batches, paired
and interleaved with full depth in one process.

    python benchmarks/mue.py --train full       # and --train shallow: minutes each; kept under runs/mue_bench
    python benchmarks/mue.py --choose           # thresholds on the validation pictures of the search seed
    python benchmarks/mue.py                    # figures on test pictures; draws docs/mue_*.png

Ways of exiting: `mue` (saturation in encoder and decoder), `entropy` and `patience` (in the decoder, with the encoder
whole or exiting as MuE's), `random` (layers drawn anew from MuE's own depths, so that its cost is MuE's). The last line
is one JSON object.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from _measure import ROOT, emit
from torch import Tensor

from mmskip import EarlyExitConfig, viz
from mmskip.datasets.captions import CaptionCollate, CaptionData, PictureDataset
from mmskip.datasets.scene_captions import SceneCaptionsConfig
from mmskip.exits import SampleScores, TokenScores
from mmskip.files import write_json
from mmskip.models.captioner import Captioner
from mmskip.models.captioner_build import captured, left_behind
from mmskip.timing import interleaved_ratio
from mmskip.train.cli import main as train_cli
from mmskip.train.evaluation.captioners import Batch, encoded
from mmskip.train.evaluation.captioning import captioned
from mmskip.train.evaluation.exits import compute, depths, recording, using
from mmskip.train.evaluation.snli_ve import judged
from mmskip.train.metrics.captions import score_captions
from mmskip.train.trained import find_run, load_captioner, load_data

FOLDER = ROOT / "runs" / "mue_bench"
TASKS = {"entailment": ("accuracy", 0.99), "caption": ("cider", 0.96)}
"""The metric of a task, and the share of full depth's that a setting must keep."""
SHALLOW = {"encoder_layers": 2, "decoder_layers": 3}
SEARCH_SEED, SEEDS = 100, (1, 2)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
QUANTILES = {
    "image": (0.1, 0.5),
    "text": (0.1, 0.5),
    "saturation": (0.02, 0.1, 0.3, 0.6),
    "entropy": (0.02, 0.1, 0.3, 0.6),
}


@dataclass(frozen=True)
class Setting:
    """A way of leaving layers early.

    Attributes:
        way: `full`, `mue`, `entropy`, `patience`.
        config: None: every layer runs.
    """

    way: str
    config: EarlyExitConfig | None = None


Tried = tuple[Setting, float, float]
"""A setting, its quality, and the layers that ran per sample."""

# --- models and pictures --------------------------------------------------------------------------------------------


def train(name: str, options: Sequence[str]) -> None:
    """Train by the recipe; the shallow model differs in its layers only."""
    layers = [f"--model.text.{key}={value}" for key, value in SHALLOW.items()] if name == "shallow" else []
    root = [f"--data.root={FOLDER / 'data'}", f"--runs_dir={FOLDER / 'runs'}", f"--name={name}"]
    train_cli(["fit", "--config", "mue.yaml", *root, *layers, *options])


class Pictures:
    """Pictures of one seed with one kind of text each, read once.

    Args:
        data: of the run.
        split: "val" or "test".
        seed: of the set.
        count: pictures.
    """

    def __init__(self, data: CaptionData, split: str, seed: int, count: int) -> None:
        config = replace(data.generated, **{"train": 1, "val": 1, "test": 1, "seed": seed, split: count})
        own = CaptionData(str(FOLDER / "data"), SceneCaptionsConfig(**_fields(config)), image_size=data.image_size)
        own.prepare_data()
        self.collate: CaptionCollate = data.collate()
        self.entries = own.entries(split)
        self.dataset = PictureDataset(self.entries, own.image_size)

    def batches(self, task: str, size: int, blank: bool = False) -> list[Batch]:
        """All pictures with their captions, or with their pairs."""
        dataset = PictureDataset(self.entries, self.dataset.size, blank=blank)
        found = []
        for begin in range(0, len(dataset), size):
            batch = self.collate([dataset[n] for n in range(begin, min(begin + size, len(dataset)))])
            found.append({**batch, "entailment" if task == "caption" else "caption": None})
        return found


def _fields(config: SceneCaptionsConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


# --- quality --------------------------------------------------------------------------------------------------------


def records(
    model: Captioner, task: str, batches: Sequence[Batch], config: EarlyExitConfig | None, tokenizer: Any
) -> list[dict[str, Any]]:
    """What was said of every sample, and the layers that ran."""
    found: list[dict[str, Any]] = []
    with torch.no_grad(), using(model, config), recording(model) as record:
        for batch in batches:
            record.clear()
            if task == "caption":
                found += captioned(model, batch, record, 1, tokenizer)
            else:
                found += [row for one in judged(model, batch, record) for row in one["rows"]]
    return found


def quality(task: str, rows: Sequence[dict[str, Any]], references: dict[str, tuple[str, ...]]) -> float:
    """Accuracy, or CIDEr."""
    if task == "entailment":
        return sum(row["right"] for row in rows) / len(rows)
    return score_captions({row["uid"]: row["caption"] for row in rows}, references).totals["CIDEr"]


def references_of(pictures: Pictures) -> dict[str, tuple[str, ...]]:
    """Captions by picture."""
    return {entry.uid: entry.captions for entry in pictures.entries}


def layers_run(rows: Sequence[dict[str, Any]], parts: Sequence[str] = ("image", "prompt", "decoder")) -> float:
    """Mean layers per sample that ran; a token's layer counts as one call."""
    return sum(sum(_all(row[part])) for row in rows for part in parts) / len(rows)


def _all(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


# --- choosing thresholds --------------------------------------------------------------------------------------------


@torch.no_grad()
def observed(model: Captioner, batches: Sequence[Batch], task: str) -> dict[str, list[float]]:
    """Scores at full depth: saturation of images and prompts; saturation and entropy of tokens in the decoder."""
    found: dict[str, list[float]] = {"image": [], "text": [], "saturation": [], "entropy": []}
    for batch in batches:
        texts = batch[task]
        with captured(model.view.encoder) as states:
            inside = encoded(model, batch, texts)
        depth = len(model.view.encoder)
        for name, part, real in (
            ("image", states[:depth], None),
            ("text", states[depth:], texts.prompt_mask.bool()),
        ):
            scores = SampleScores("saturation", real)
            for before, after in pairwise(part):
                found[name] += scores(after, before).tolist()
        with captured(model.view.decoder) as states:
            model.layer_logits(*inside, texts.labels, [len(model.view.decoder)])
        at = texts.labels != -100
        for criterion in ("saturation", "entropy"):
            token = TokenScores(criterion, model.view.head())
            for before, after in pairwise(states):
                found[criterion] += token(after, before)[at].tolist()
    return found


def quantiles(scores: dict[str, list[float]], part: str) -> list[float]:
    """Thresholds that differ in what they let go, and one that never fires."""
    taken = torch.tensor(scores[part]).quantile(torch.tensor(QUANTILES[part])).tolist()
    return sorted({min(round(value - 1e-4, 4), 1.0) for value in (*taken, 1.0001)})


def _tried(
    model: Captioner, task: str, batches: Sequence[Batch], settings: Sequence[Setting], told: Any, words: Any
) -> list[Tried]:
    """Every setting with its quality and its layers."""
    found = []
    for setting in settings:
        rows = records(model, task, batches, setting.config, words)
        found.append((setting, quality(task, rows, told), layers_run(rows)))
    return found


def choose(model: Captioner, data: CaptionData, count: int, tasks: Sequence[str]) -> dict[str, Any]:
    """Per task and way the setting that the report will show."""
    pictures = Pictures(data, "val", SEARCH_SEED, count)
    told, chosen = references_of(pictures), dict[str, Any]()
    for task in tasks:
        share = TASKS[task][1]
        batches = pictures.batches(task, 50)
        scores = observed(model, batches[:2], task)
        full = records(model, task, batches, None, data.tokenizer)
        goal = share * quality(task, full, told)
        own = [
            Setting("mue", EarlyExitConfig(image=image, text=text, decoder=decoder))
            for image, text, decoder in product(*(quantiles(scores, part) for part in ("image", "text", "saturation")))
        ]
        tried = _tried(model, task, batches, own, told, data.tokenizer)
        best = min((t for t in tried if t[1] >= goal), key=lambda t: t[2], default=max(tried, key=lambda t: t[1]))
        kept = {"full": {"quality": goal / share, "layers": layers_run(full)}, "mue": _told(best)}
        assert best[0].config is not None
        heads = [
            Setting(way, EarlyExitConfig(**encoder, decoder=threshold, criterion=way))
            for encoder in ({}, {"image": best[0].config.image, "text": best[0].config.text})
            for way, thresholds in (
                ("entropy", [max(t, 0.0) for t in quantiles(scores, "entropy")]),
                ("patience", [float(n) for n in range(1, len(model.view.decoder) - 1)]),
            )
            for threshold in thresholds
        ]
        others = _tried(model, task, batches, heads, told, data.tokenizer)
        for way in ("entropy", "patience"):
            affordable = [t for t in others if t[0].way == way and t[2] <= 1.02 * best[2]]
            cheapest = min((t for t in others if t[0].way == way), key=lambda t: t[2])
            kept[way] = _told(max(affordable, key=lambda t: t[1], default=cheapest))
        kept["tried"] = [{"way": t[0].way, **_told(t)} for t in (*tried, *others)]
        chosen[task] = kept
        print(task, {way: (one["quality"], one["layers"]) for way, one in kept.items() if way != "tried"}, flush=True)
    return chosen


def _told(tried: Tried) -> dict[str, Any]:
    setting, value, layers = tried
    return {"config": setting.config.to_dict() if setting.config else None, "quality": value, "layers": layers}


# --- random exits ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def random_quality(
    model: Captioner, task: str, batches: Sequence[Batch], rows: Sequence[dict[str, Any]], pictures: Pictures
) -> float:
    """Quality when every picture, prompt and token leaves at a layer drawn from those at which MuE's left, whatever its
    state. It costs what MuE costs."""
    drawn = random.Random(0)
    depth = {part: [n for row in rows for n in _all(row[part])] for part in ("image", "prompt", "decoder")}
    right = count = 0
    captions: dict[str, str] = {}
    for batch in batches:
        texts = batch[task] if task == "entailment" else batch[task].first_of_each()
        seen = _left(model, batch["images"], None, [drawn.choice(depth["image"]) for _ in batch["images"]])
        read = _left(model, texts.prompt, texts.prompt_mask, [drawn.choice(depth["prompt"]) for _ in texts.uids])
        states = torch.cat([seen[texts.image], read], 1)
        mask = torch.cat([texts.prompt_mask.new_ones(len(texts.uids), seen.shape[1]), texts.prompt_mask], 1)

        def layers(amount: int) -> Tensor:
            return torch.tensor([drawn.choice(depth["decoder"]) for _ in range(amount)])

        if task == "entailment":
            with left_behind(model.view.decoder, layers(len(states))):
                said = model.judge(states, mask).argmax(-1)
            right += int((said == torch.tensor(texts.label)).sum())
            count += len(said)
        else:
            ids = _random_captions(model, states, mask, layers)
            told = pictures.collate.tokenizer.batch_decode(ids, skip_special_tokens=True)
            captions |= dict(zip(texts.uids, told, strict=True))
    if task == "entailment":
        return right / count
    return score_captions(captions, references_of(pictures)).totals["CIDEr"]


def _left(model: Captioner, inputs: Tensor, mask: Tensor | None, layers: list[int]) -> Tensor:
    encoder = model.llm.get_encoder()
    given = {"inputs_embeds": model.image_embeddings(inputs)} if mask is None else {"input_ids": inputs}
    with left_behind(model.view.encoder, torch.tensor(layers)):
        return encoder(**given, attention_mask=mask)[0]


def _random_captions(model: Captioner, states: Tensor, mask: Tensor, layers: Callable[[int], Tensor]) -> Tensor:
    """Greedy captions, every token of which leaves the decoder at a drawn layer; its state there gives the keys and
    values of the layers above (the policy `project`)."""
    ids = torch.full((len(states), 1), model.start_id)
    depth = torch.empty(len(states), 0, dtype=torch.long)
    for _ in range(model.hparams["max_new_tokens"]):
        depth = torch.cat([depth, layers(len(states))[:, None]], 1)
        with left_behind(model.view.decoder, depth):
            logits = model.llm(
                encoder_outputs=_outputs(states), attention_mask=mask, decoder_input_ids=ids, use_cache=False
            ).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    eos = model.hparams["tokens"]["eos_token_id"]
    return ids.masked_fill((ids == eos).cumsum(1) > 0, model.hparams["tokens"]["pad_token_id"])


def _outputs(states: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


# --- report ---------------------------------------------------------------------------------------------------------


def call_of(task: str, batch: Batch) -> Callable[[Captioner], Any]:
    """What is timed: from pictures and texts to the answers."""
    texts = batch[task] if task == "entailment" else batch[task].first_of_each()
    if task == "entailment":
        return lambda model: model.judge(*encoded(model, batch, texts))
    return lambda model: model.caption(*encoded(model, batch, texts), num_beams=1)


def single(pictures: Pictures, task: str, count: int) -> list[Batch]:
    """Samples one by one: of entailment one pair of each picture."""
    found = pictures.batches(task, 1)[:count]
    if task == "entailment":
        found = [{**batch, task: batch[task].rows([n % len(batch[task].uids)])} for n, batch in enumerate(found)]
    return found


def together(pictures: Pictures, task: str, rows: int) -> list[Batch]:
    """One batch of so many rows, each with a picture of its own."""
    (batch,) = pictures.batches(task, rows)[:1]
    texts = batch[task].first_of_each()
    return [{**batch, task: texts}]


def timed(
    models: dict[str, Captioner], chosen: dict[str, Any], pictures: Pictures, options: argparse.Namespace
) -> dict[str, Any]:
    """Time and FLOPs of every setting against full depth, single samples and batches."""
    model, found = models["full"], dict[str, Any]()
    for task in TASKS:
        few = options.timed if task == "entailment" else max(2, options.timed // 4)
        for size, batches in ((1, single(pictures, task, few)), (32, together(pictures, task, 32))):
            calls = [call_of(task, batch) for batch in batches]
            for way, config in settings_of(chosen[task]).items():
                cost = compute(model, config, calls, options.pairs, CLOCKS[options.clock])
                found.setdefault(task, {}).setdefault(way, {})[str(size)] = cost
            if "shallow" in models:
                ratio = interleaved_ratio(
                    lambda calls=calls: [call(model) for call in calls],
                    lambda calls=calls: [call(models["shallow"]) for call in calls],
                    options.pairs,
                    clock=CLOCKS[options.clock],
                )
                found[task].setdefault("shallow", {})[str(size)] = {
                    "counted": None, "measured": 1 / ratio.median, "low": 1 / ratio.q3, "high": 1 / ratio.q1
                }  # fmt: skip
            print(task, size, {way: round(v[str(size)]["measured"], 3) for way, v in found[task].items()}, flush=True)
    return found


def settings_of(chosen: dict[str, Any]) -> dict[str, EarlyExitConfig]:
    """The chosen configs by way."""
    return {way: EarlyExitConfig.from_dict(one["config"]) for way, one in chosen.items() if "config" in one}


def scored(
    models: dict[str, Captioner], chosen: dict[str, Any], sets: Sequence[Pictures], tokenizer: Any
) -> dict[str, Any]:
    """Quality of every setting on each set of test pictures, and exits on all of them."""
    model, found = models["full"], dict[str, Any]()
    for task in TASKS:
        ways = {"full": None, **settings_of(chosen[task])}
        found[task] = {way: {"by_seed": [], "rows": []} for way in [*ways, "random", "blanked", "shallow"]}
        for pictures in sets:
            batches, told = pictures.batches(task, 50), references_of(pictures)
            for way, config in ways.items():
                rows = records(model, task, batches, config, tokenizer)
                found[task][way]["by_seed"].append(quality(task, rows, told))
                if task == "caption":
                    rows = [{**row, "right": row["caption"] in told[row["uid"]]} for row in rows]
                if way in ("full", "mue"):
                    found[task][way]["rows"] += rows
                if way == "mue":
                    value = random_quality(model, task, batches, rows, pictures)
                    found[task]["random"]["by_seed"].append(value)
            blank = records(model, task, pictures.batches(task, 50, blank=True), None, tokenizer)
            found[task]["blanked"]["by_seed"].append(quality(task, blank, told))
            if "shallow" in models:
                rows = records(models["shallow"], task, batches, None, tokenizer)
                found[task]["shallow"]["by_seed"].append(quality(task, rows, told))
        for one in found[task].values():
            one["quality"] = sum(one["by_seed"]) / len(one["by_seed"]) if one["by_seed"] else None
            rows = one.pop("rows")
            if rows:
                one["exits"] = depths(rows, model)
        print(task, {way: one["quality"] for way, one in found[task].items()}, flush=True)
    return found


def draw(scores: dict[str, Any], times: dict[str, Any], folder: Path) -> None:
    """Per task: where MuE leaves, and quality against counted FLOPs and measured time of single samples."""
    for task, (metric, _) in TASKS.items():
        note = f"{task}: where MuE leaves, test pictures of {len(SEEDS)} seeds"
        figure = viz.exit_depths(scores[task]["mue"]["exits"]["histogram"], note)
        viz.save_png(figure, folder / f"mue_{task}_exits.png")
        points = []
        for way, one in scores[task].items():
            cost = times[task].get("mue" if way == "random" else way, {}).get("1", {"counted": 1.0, "measured": 1.0})
            if one["quality"] is not None and way != "blanked":
                points.append({"label": way, "value": one["quality"], "highlight": way == "mue", **cost})
        note = f"{task}, single samples; a blanked image leaves {scores[task]['blanked']['quality']:.3g}"
        figure = viz.quality_against_compute(points, metric, lower_is_better=False, note=note)
        viz.save_png(figure, folder / f"mue_{task}.png")


def main() -> None:
    """Train, choose or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--train", choices=("full", "shallow"), help="train one of the models, and end")
    parser.add_argument("--choose", action="store_true", help="choose thresholds, and end")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="whose thresholds are chosen")
    parser.add_argument("--score", action="store_true", help="quality on test pictures, and end (no timing)")
    parser.add_argument("--count", type=int, default=200, help="pictures per set (default 200)")
    parser.add_argument("--timed", type=int, default=20, help="single samples that are timed (default 20)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of one thread, on a machine with other work"
    )
    parser.add_argument("--pairs", type=int, default=15, help="paired runs (default 15)")
    options, rest = parser.parse_known_args()
    if options.train:
        train(options.train, rest)
        return
    trained = [name for name in ("full", "shallow") if list((FOLDER / "runs" / name).glob("*/results.json"))]
    runs = {name: find_run(FOLDER / "runs" / name) for name in trained}
    models = {name: load_captioner(run) for name, run in runs.items()}
    data = load_data(runs["full"])
    data.prepare_data()
    file, scores_file = FOLDER / "chosen.json", FOLDER / "scores.json"
    if options.choose:
        known = json.loads(file.read_text()) if file.is_file() else {}
        write_json({**known, **choose(models["full"], data, options.count, options.tasks)}, file)
        return
    chosen = json.loads(file.read_text())
    sets = [Pictures(data, "test", seed, options.count) for seed in SEEDS]
    if options.score or not scores_file.is_file():
        write_json(scored(models, chosen, sets, data.tokenizer), scores_file)
    scores = json.loads(scores_file.read_text())
    if options.score:
        return
    if options.clock == "cpu":
        torch.set_num_threads(1)
    with torch.no_grad():
        times = timed(models, chosen, sets[0], options)
    draw(scores, times, ROOT / "docs")
    report(models["full"], chosen, scores, times, options.clock)


def report(model: Captioner, chosen: dict[str, Any], scores: dict[str, Any], times: dict[str, Any], clock: str) -> None:
    """Print the table and the JSON line."""
    for task, (metric, share) in TASKS.items():
        print(f"\n{task} ({metric}; {share:.0%} of full depth is kept on the validation pictures)")
        for way, one in scores[task].items():
            cost = times[task].get(way, times[task].get("mue") if way == "random" else None) or {}
            cells = [f"{size}: {c['measured']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for size, c in cost.items()]
            value = "-" if one["quality"] is None else f"{one['quality']:.4f}"
            print(f"  {way:<9} {value:>8}  time of full depth at batch " + "; ".join(cells))
    mue = times["entailment"]["mue"]["1"]
    view = model.view
    emit(
        {
            "name": "mue",
            "speedup": round(1 / mue["measured"], 4),
            "ideal": round(1 / mue["counted"], 4),
            "clock": clock,
            "shape": f"{len(view.encoder)}+{len(view.decoder)} layers, width {model.llm.config.d_model}",
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


if __name__ == "__main__":
    main()
